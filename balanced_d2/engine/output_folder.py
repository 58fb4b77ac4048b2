"""OUTPUT_DIR: whether a training may begin in it, and moving an older training aside."""

import logging
import os
import time
from typing import Sequence

from balanced_d2.checkpoint import training_in
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.files import raise_if_unwritable


def check_unused(folder: str) -> None:
    """Raise :class:`UserError` if a folder holds a training: one that begins would be mixed into
    it."""
    checkpoint = training_in(folder)
    if checkpoint:
        raise UserError(
            f"OUTPUT_DIR {folder} holds a training ({checkpoint}): --resume continues it, "
            "--overwrite moves it to a folder beside and begins again; or choose another OUTPUT_DIR"
        )


def check_movable(folder: str, needed: Sequence[str]) -> None:
    """Raise :class:`UserError` if a training is to be moved aside that has files which the next one
    needs.

    Args:
        needed: paths; empty ones and addresses do not count.
    """
    if not training_in(folder):
        return
    inside = os.path.join(os.path.realpath(folder), "")
    for path in needed:
        if path and "://" not in path and os.path.realpath(path).startswith(inside):
            raise UserError(
                f"--overwrite would move {path} away, which the new training needs; choose another "
                "OUTPUT_DIR, or copy it"
            )


def move_aside(folder: str) -> None:
    """Move a folder that holds a training to one beside it, with date and time in its name.

    Raises:
        UserError: if it cannot be moved.
    """
    if not training_in(folder):
        return
    folder = os.path.realpath(folder)
    target = beside = f"{folder}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    number = 1
    while os.path.exists(target):
        number += 1
        target = f"{beside}_{number}"
    with raise_if_unwritable(f"OUTPUT_DIR {folder}"):
        os.rename(folder, target)
        os.mkdir(folder)  # for links to it
    logging.getLogger(__name__).warning(f"--overwrite: the older training is now in {target}")
