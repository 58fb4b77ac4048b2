"""Errors that the user can fix, and how programs report them."""

import importlib.util
import logging
import os
import signal
import sys
from contextlib import contextmanager
from typing import Callable, Collection, Iterator, Sequence, Type

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


class UserError(ValueError):
    """A mistake in the user's input: a config, an argument, a file, an annotation.

    The message says which one, what is wrong and what to do. Programs show it as one line without
    a traceback; library code sees an ordinary ``ValueError``.
    """


class StopTraining(Exception):
    """Stops training for a reason that needs no traceback.

    Args:
        message: text for the user.
        exit_code: exit code of the program.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USER_ERROR):
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def raise_user_errors(
    source: str, *kinds: Type[Exception], explain: Callable[[Exception], str] = str
) -> Iterator[None]:
    """Context manager that turns exceptions into :class:`UserError`: "source: what is wrong".

    Args:
        source: the file, option or dataset at fault.
        *kinds: types of exceptions, besides OSError, which means that a file cannot be read.
        explain: returns what the message says about an exception.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{source}: cannot read {error.filename}: {reason}") from error
    except kinds as error:
        raise UserError(f"{source}: {explain(error)}") from error


@contextmanager
def no_traceback_of(kind: Type[Exception]) -> Iterator[None]:
    """Context manager in which Detectron2's training loop logs no traceback for a type of error."""
    logger = logging.getLogger("detectron2.engine.train_loop")

    def is_other(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], kind))

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def first_of(problems: Sequence[str], number: int = 3) -> str:
    """The first few problems in one text, with the number of the others; endless names are cut."""
    more = f" and {len(problems) - number} more" if len(problems) > number else ""
    shown = [p if len(p) <= 500 else f"{p[:500]}..." for p in problems[:number]]
    return "; ".join(shown) + more


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise :class:`UserError` if ``value``, called ``name`` in the message, is not a choice."""
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose one of: {', '.join(choices)}")


def check_package(module: str, needed_by: str, source: str = "") -> None:
    """Raise :class:`UserError` if an optional package is not installed.

    Args:
        module: its name, both to import and to install.
        needed_by: what needs it; the message begins with this.
        source: what to install, if that is not the name.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{needed_by} needs the package {module}; run: pip install {source or module}"
        )


def report_user_errors(main: Callable, *args) -> int:
    """Call ``main(*args)``; print a :class:`UserError` as one line on standard error.

    Returns:
        The exit code for the program: 0, 2 after an error, that of :class:`StopTraining`, 130
        after Ctrl-C, or 1 if nobody reads the output any more, as after ``| head``.
    """
    try:
        exit_code = _call_and_report(main, *args)
        print(end="", flush=True)  # at the end of the process, nothing could be caught
        return exit_code
    except BrokenPipeError:
        if _has_reader():  # it is another pipe
            raise
        # What is left in the buffer goes nowhere, so that the end of the process raises nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _call_and_report(main: Callable, *args) -> int:
    try:
        main(*args)
    except UserError as error:
        print(f"error: {_on_one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except StopTraining as stop:
        is_error = stop.exit_code == EXIT_USER_ERROR
        text = _on_one_line(stop)
        print(f"error: {text}" if is_error else text, file=sys.stderr, flush=True)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    return 0


def _has_reader() -> bool:
    """Whether somebody reads the standard output: tried with an empty line."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return False
    return True


def _on_one_line(error: Exception) -> str:
    """What an error says; names of files and classes may have line breaks."""
    return " ".join(str(error).splitlines())
