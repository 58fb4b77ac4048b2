"""Files that are there whole or not at all."""

import os
import tempfile
from contextlib import contextmanager
from typing import Iterator

from balanced_d2.errors import UserError


def check_writable(path: str) -> None:
    """Make the folder of ``path``; raise :class:`UserError` if it cannot be written to."""
    folder = os.path.dirname(path) or "."
    with _told_as(folder):
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Give the name of a temporary file which becomes ``path`` at the end, if nothing is raised.

    Raises:
        UserError: if the folder of ``path`` cannot be written to.
    """
    folder, name = os.path.split(path)
    with _told_as(folder or "."):
        # The file has its final name from the start: PyTorch writes it into the file.
        temporary = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder or ".")
    with temporary as temporary_folder:
        file = os.path.join(temporary_folder, name)
        yield file
        os.replace(file, path)


@contextmanager
def _told_as(folder: str):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error
