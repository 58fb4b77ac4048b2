"""Checkpoints that are whole or not there, and loading that runs no code and hides no misfit."""

import errno
import logging
import os
import pickle
import shutil
from typing import List, Tuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from balanced_d2.checkpoint.unpickle import check_arrays
from balanced_d2.utils.errors import StopTraining, UserError, first_of
from balanced_d2.utils.files import check_writable, open_replacing

# What reading a file that is no checkpoint, or a damaged one, ends in.
READ_ERRORS = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


class BalancedCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safe against crashes and against what files may hold.

    - A file is written beside its final name, flushed to disk and then renamed: at any instant,
      each checkpoint is whole or not there.
    - The newest checkpoint is found by the iterations that the files hold. Those that cannot be
      read are reported and passed over; no file is ever deleted.
    - No code from a file is run.

    Args: as for Detectron2's ``DetectionCheckpointer``.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        self.path_manager: _AtomicWrites = _AtomicWrites(self.path_manager)

    def save(self, name: str, **kwargs) -> None:
        """
        Raises:
            StopTraining: if weights are not finite, so that no good checkpoint is followed by one
                that training cannot go on from, or the file cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = self.model.state_dict()
        broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
        if broken:
            raise StopTraining(
                f"not saved as {name}: {len(broken)} of the model's tensors hold NaN or infinity, "
                f"{broken[0]} the first; the checkpoints of before stay. Try a lower "
                "SOLVER.BASE_LR, a longer warm-up or SOLVER.CLIP_GRADIENTS"
            )
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # PyTorch raises the second for a full disk
            raise StopTraining(
                f"cannot write the checkpoint {name}.pth to {self.save_dir}: {_reason(error)}; the "
                "checkpoints of before stay, and --resume goes on from the last one"
            ) from error

    def get_checkpoint_file(self) -> str:
        """The checkpoint of the latest iteration in ``save_dir`` that can be read, or ``""``."""
        return _newest(self.save_dir)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def resume_or_load(self, path: str, *, resume: bool = True):
        newest = self.get_checkpoint_file() if resume else ""
        return self.load(newest) if newest else self.load(path, checkpointables=[])

    def load(self, path: str, *args, **kwargs):
        """
        Raises:
            UserError: if the file cannot be read.
        """
        try:
            return super().load(path, *args, **kwargs)
        except UserError:
            raise
        except READ_ERRORS as error:
            raise UserError(f"cannot load the checkpoint {path}: {_reason(error)}") from error

    def _load_file(self, filename: str):
        if filename.endswith(".pkl"):
            check_arrays(filename)
        return super()._load_file(filename)


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint that holds this very model, not one that a training starts from.

    Detectron2's checkpointer leaves weights that the checkpoint lacks as they were initialised.

    Raises:
        UserError: if the checkpoint cannot be read, or weights are missing in it, left over or of
            another shape.
    """
    try:
        _FittingCheckpointer(model).load(path)
    except UserError as error:
        raise UserError(f"MODEL.WEIGHTS: {error}") from error


def check_space(folder: str, needed: int) -> None:
    """Raise :class:`UserError` if a folder cannot take a file.

    Args:
        folder: made if it is not there.
        needed: size of the file in bytes.
    """
    check_writable(os.path.join(folder, "checkpoint"), "OUTPUT_DIR")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"OUTPUT_DIR {folder}: a checkpoint takes about {needed / 2**20:,.0f} MiB, but only "
            f"{free / 2**20:,.0f} MiB are free; make room or choose another OUTPUT_DIR"
        )


class _FittingCheckpointer(BalancedCheckpointer):
    def _log_incompatible_keys(self, incompatible):
        reshaped = {key for key, _, _ in incompatible.incorrect_shapes}
        problems = [
            *(f"{key} is missing" for key in incompatible.missing_keys if key not in reshaped),
            *(f"{key} is left over" for key in incompatible.unexpected_keys),
            *(
                f"{key} has shape {theirs}, not {ours}"
                for key, theirs, ours in incompatible.incorrect_shapes
            ),
        ]
        if problems:
            raise ValueError(
                "it does not hold the model that the config describes: " + first_of(problems)
            )


class _AtomicWrites:
    """A path manager whose files appear under their names when they are complete and on disk."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" not in mode or "://" in path:
            return self._path_manager.open(path, mode, **kwargs)
        return open_replacing(path, mode, **kwargs)


def _newest(folder: str) -> str:
    readable: List[Tuple[int, float, str]] = []
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pth"))
    except OSError:
        return ""
    for name in names:
        path = os.path.join(folder, name)
        try:
            # Mapped, so that of the tensors only the place in the file is read.
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if "iteration" in content:  # not other weights that lie in the folder
                readable.append((content["iteration"], os.path.getmtime(path), path))
        except READ_ERRORS as error:
            logging.getLogger(__name__).warning(
                f"the checkpoint {path} cannot be read and is passed over: {_reason(error)}"
            )
    return max(readable, default=(0, 0.0, ""))[2]


def _reason(error: BaseException) -> str:
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in causes):
        return "no space left on the disk"
    return (str(error).splitlines() or [type(error).__name__])[0]
