"""Writing files so that they are either complete or absent."""

import os
import tempfile
from contextlib import contextmanager
from typing import IO, Iterable, Iterator, Tuple

from balanced_d2.utils.errors import UserError


def check_writable(path: str, what: str = "the folder") -> None:
    """Create the folder of ``path``; raise :class:`UserError` if it cannot be written to.

    Args:
        what: what the message calls the folder.
    """
    folder = os.path.dirname(path) or "."
    with raise_if_unwritable(f"{what} {folder}"):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def check_keeps_inputs(outputs: Iterable[str], inputs: Iterable[str]) -> None:
    """Raise :class:`UserError` if an output is one of the inputs, by whatever name: another path,
    a link, or other upper and lower case where the file system does not tell these apart."""
    read = {_identity(path) for path in inputs if os.path.exists(path)}
    for path in outputs:
        if os.path.exists(path) and _identity(path) in read:
            raise UserError(f"{path} is an input and would be replaced: choose another --output")


def _identity(path: str) -> Tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield the name of a temporary file that becomes ``path`` at the end, if nothing is raised.

    Raises:
        UserError: if the folder of ``path`` cannot be written to.
    """
    folder, name = os.path.split(path)
    with raise_if_unwritable(f"the folder {folder or '.'}"):
        # In a folder of its own, the file can have its final name, which PyTorch writes into it.
        temporary = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder or ".")
    with temporary as temporary_folder:
        file = os.path.join(temporary_folder, name)
        yield file
        os.replace(file, path)


@contextmanager
def open_replacing(path: str, mode: str, **kwargs) -> Iterator[IO]:
    """Open ``path`` for writing; it is replaced at the end, once everything is on disk.

    Unlike :func:`replacing`, this is safe against a crash at any instant. An interrupted write
    leaves a file that ends in ``.partial``, which the next write replaces.

    Args:
        mode, **kwargs: as for ``open``.
    """
    partial = f"{path}.partial"
    with open(partial, mode, **kwargs) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "nt":  # where folders cannot be opened
        return
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # writes the new name to disk
    finally:
        os.close(folder)


@contextmanager
def raise_if_unwritable(what: str) -> Iterator[None]:
    """Turn OSError into :class:`UserError`; ``what`` says what cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {what}: {error.strerror}") from error
