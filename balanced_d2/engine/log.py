"""The log from the first check on: on the console at once, later in OUTPUT_DIR, too."""

import logging
import sys
from contextlib import contextmanager
from typing import Iterator, List

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from balanced_d2.utils.files import raise_if_unwritable

NAMES = ("detectron2", "balanced_d2")


class _Keeping(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records: List[logging.LogRecord] = []

    def emit(self, record):
        self.records.append(record)


@contextmanager
def early_log() -> Iterator[List[logging.LogRecord]]:
    """Context manager that shows what is logged on the console only, and yields it for
    :func:`start_log`."""
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [list(logger.handlers) for logger in loggers]
    keeping = _Keeping()
    for logger in loggers:
        setup_logger(distributed_rank=comm.get_rank(), name=logger.name)
        logger.addHandler(keeping)
    try:
        yield keeping.records
    finally:
        for logger, handlers in zip(loggers, before):
            logger.handlers[:] = handlers


def start_log(folder: str, records: List[logging.LogRecord]) -> None:
    """Log to the console and to ``log.txt`` in a folder, which begins with what was logged before.

    Raises:
        UserError: if it cannot be written.
    """
    for name in NAMES:
        with raise_if_unwritable(f"OUTPUT_DIR {folder}"):
            # As default_setup will call it.
            prefix = {} if name == "detectron2" else {"name": name}
            logger = setup_logger(folder, distributed_rank=comm.get_rank(), **prefix)
        for handler in logger.handlers:
            if getattr(handler, "stream", sys.stdout) not in (sys.stdout, sys.stderr):
                for record in records:
                    if record.name.partition(".")[0] == name:
                        handler.handle(record)
