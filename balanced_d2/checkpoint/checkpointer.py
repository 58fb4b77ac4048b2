"""Crash-safe checkpoints, and loading that runs no code and hides no mismatch."""

import errno
import logging
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from fvcore.common.checkpoint import _strip_prefix_if_present
from torch import nn

from balanced_d2.checkpoint import finetune
from balanced_d2.checkpoint.unpickle import check_arrays, numpy_allowed
from balanced_d2.utils.errors import StopTraining, UserError, first_of
from balanced_d2.utils.files import check_writable, open_replacing

# A suffix of paths.
MATCHING_HEURISTICS = "?matching_heuristics=True"
CONFIG, GRAY_RANGE = "config", "gray_range"  # keys of a checkpoint
# What a checkpoint has besides "model" if the weights were averaged: the average, as its "model".
AVERAGED = "model_ema"
# Tensors that older checkpoints have and models no longer do: theirs are those of the config.
PIXELS = ("pixel_mean", "pixel_std")

# Exceptions from reading a file that is damaged or not a checkpoint.
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
    """Detectron2's checkpointer, made safe against crashes and against malicious files.

    - A file is written beside its final name, flushed to disk and then renamed: at any instant,
      each checkpoint is either complete or absent.
    - Training resumes from the file that ``last_checkpoint`` names, or else from the latest one of
      the same training that can be read. Files that cannot be read are reported.
    - A file that does not hold exactly the model is refused: nothing stays random.
    - No code in a file is run.
    - ``x.pth?matching_heuristics=True`` matches the names in a local file heuristically, which
      Detectron2 itself supports only on main and only in a single process.

    Args: as for Detectron2's ``DetectionCheckpointer``, and:
        class_names: of the model's classes, which are saved with it.
        config: the training's, as text, which is saved, too.
        gray_range: ``INPUT.GRAY_RANGE``, which is saved with it unless it is 0.
        averaged: whether the averaged weights of a file are loaded (``SOLVER.EMA``), if it has any.
            The log says which are.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: Optional[Sequence[str]] = None,
        config: str = "",
        gray_range: float = 0.0,
        averaged: bool = False,
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.class_names = class_names and list(class_names)
        self.config = config
        self.gray_range = gray_range
        self.averaged = averaged
        self.path_manager: _AtomicWrites = _AtomicWrites(self.path_manager)
        self._matching_heuristics = False  # True while such a file is loaded

    def save(self, name: str, **kwargs) -> None:
        """
        Raises:
            StopTraining: if the file cannot be written, or if weights are not finite, so that the
                last checkpoint is always one that training can resume from.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = self.model.state_dict()
        broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
        if broken:
            raise StopTraining(
                f"{name} was not saved: {len(broken)} of the model's tensors contain NaN or "
                f"infinity (the first is {broken[0]}); earlier checkpoints are kept. Try a lower "
                "SOLVER.BASE_LR, a longer warm-up or SOLVER.CLIP_GRADIENTS"
            )
        if self.class_names:
            kwargs.setdefault(finetune.CLASS_NAMES, self.class_names)
        if self.config:
            kwargs.setdefault(CONFIG, self.config)
        if self.gray_range:
            kwargs.setdefault(GRAY_RANGE, self.gray_range)
        try:
            super().save(name, **kwargs)
        except (OSError, RuntimeError) as error:  # PyTorch raises the second for a full disk
            raise StopTraining(
                f"cannot write the checkpoint {name}.pth to {self.save_dir}: {_reason(error)}; "
                "earlier checkpoints are kept, and --resume continues from the last one"
            ) from error

    def get_checkpoint_file(self) -> str:
        """The checkpoint in ``save_dir`` to resume from, or ``""``.

        Raises:
            UserError: if there are checkpoints, but none of them can be read.
        """
        return _newest(self.save_dir)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def resume_or_load(self, path: str, *, resume: bool = True):
        newest = self.get_checkpoint_file() if resume else ""
        return self.load(newest) if newest else self.load(path, checkpointables=[])

    def load(self, path: str, *args, **kwargs):
        """
        Raises:
            UserError: if the file cannot be read, or does not hold exactly this model.
        """
        file = path.removesuffix(MATCHING_HEURISTICS) if path and "://" not in path else path
        self._matching_heuristics = file != path
        try:
            with numpy_allowed():
                return super().load(file, *args, **kwargs)
        except UserError:
            raise
        except READ_ERRORS as error:
            raise UserError(f"cannot load the checkpoint {path}: {_reason(error)}") from error
        finally:
            self._matching_heuristics = False

    def _load_file(self, filename: str):
        if filename.endswith(".pkl"):
            check_arrays(filename)
        loaded = super()._load_file(filename)
        if self._matching_heuristics:
            loaded["matching_heuristics"] = True
        if not self.checkpointables:  # otherwise, a training that is resumed
            self._choose_weights(loaded, filename)
        return loaded

    def _choose_weights(self, loaded: Dict[str, Any], filename: str) -> None:
        logger = logging.getLogger(__name__)
        if AVERAGED not in loaded:
            if self.averaged and "trainer" in loaded:
                logger.warning(f"{filename} has no averaged weights: those that it has are loaded")
        elif self.averaged:
            logger.info(f"{filename}: loading its averaged weights (SOLVER.EMA.ENABLED is True)")
            loaded["model"] = loaded[AVERAGED]["model"]
        else:
            logger.warning(
                f"{filename}: loading its weights as they were trained; SOLVER.EMA.ENABLED True "
                "loads their average"
            )

    def _log_incompatible_keys(self, incompatible):
        reshaped = {key for key, _, _ in incompatible.incorrect_shapes}
        problems = [
            *(f"{key} is missing" for key in incompatible.missing_keys if key not in reshaped),
            *(f"{k} is left over" for k in incompatible.unexpected_keys if k not in PIXELS),
            *(
                f"{key} has shape {theirs}, not {ours}"
                for key, theirs, ours in incompatible.incorrect_shapes
            ),
        ]
        if problems:
            raise ValueError(
                "it does not contain the model that the config describes: " + first_of(problems)
            )


class Contents(NamedTuple):
    """What a checkpoint says of its model, as far as it is known."""

    class_names: Optional[List[str]] = None
    num_classes: Optional[int] = None
    config: str = ""
    """``cfg.dump()`` of the training; "" in checkpoints of others and of older versions."""
    gray_range: float = 0.0
    """``INPUT.GRAY_RANGE`` of the training; 0 if it had none."""
    iteration: Optional[int] = None
    """After which it was saved, from 0."""


def read_contents(path: str) -> Contents:
    """Read what a checkpoint says of its model, before there is one to load it into.

    Args:
        path: as for ``MODEL.WEIGHTS``.

    Raises:
        UserError: if the file cannot be read.
    """
    reader = BalancedCheckpointer(nn.Module())
    path = path.removesuffix(MATCHING_HEURISTICS)
    try:
        local = reader.path_manager.get_local_path(path)
        try:
            content = _mapped(local)
        except READ_ERRORS:  # of another format, or damaged
            with numpy_allowed():
                content = reader._load_file(local)
        state = content.get("model", content)
        config = _config_of(content)
        number = finetune.num_classes(state, config)
        names = finetune.class_names_of({**content, "model": state}, number)
    except READ_ERRORS as error:
        raise UserError(f"cannot load the checkpoint {path}: {_reason(error)}") from error
    is_of_them = number is None or names is None or len(names) == number
    # Checkpoints of other projects may have something else under these names.
    gray_range, iteration = map(content.get, (GRAY_RANGE, "iteration"))
    return Contents(
        names if is_of_them else None,
        number,
        config,
        float(gray_range) if isinstance(gray_range, (int, float)) else 0.0,
        iteration if isinstance(iteration, int) else None,
    )


def _config_of(content: Dict[str, Any]) -> str:
    """The config of a checkpoint's training; "" if it has none, or that of another project."""
    config = content.get(CONFIG)
    if isinstance(config, str) and re.search("^MODEL:", config, re.MULTILINE):
        return config
    return ""


def trainer_state(path: str) -> Dict[str, Any]:
    """The state of the trainer in a checkpoint of this project; empty if it has none.

    Raises:
        UserError: if the file cannot be read.
    """
    try:
        return _mapped(path).get("trainer", {})
    except READ_ERRORS as error:
        raise UserError(f"cannot read the checkpoint {path}: {_reason(error)}") from error


def load_weights(model: nn.Module, path: str, averaged: bool = False) -> None:
    """Load a checkpoint of exactly this model, not one to start training from.

    Args:
        averaged: as for :class:`BalancedCheckpointer`.

    Raises:
        UserError: if the checkpoint cannot be read, or if its weights are missing, left over or of
            another shape.
    """
    try:
        BalancedCheckpointer(model, averaged=averaged).load(path)
    except UserError as error:
        raise UserError(f"MODEL.WEIGHTS: {error}") from error


def start_from(
    model: nn.Module,
    path: str,
    class_names: Optional[Sequence[str]] = None,
    averaged: bool = False,
) -> None:
    """Load what a checkpoint has for a model that is about to be trained.

    What depends on the classes is matched by their names; what the checkpoint lacks stays as it
    was initialised. The log has one table of it. With the same classes, this is Detectron2's own
    loading.

    Args:
        path: file or address; ``""`` leaves the model as it is.
        class_names: of the model's classes, if known.
        averaged: as for :class:`BalancedCheckpointer`.

    Raises:
        UserError: if the checkpoint cannot be read, or nothing in it, or nothing for the backbone,
            fits the model.
    """
    try:
        _StartingCheckpointer(model, class_names=class_names, averaged=averaged).load(path)
    except UserError as error:
        raise UserError(f"MODEL.WEIGHTS: {error}") from error


def check_space(folder: str, needed: int) -> None:
    """Raise :class:`UserError` if a folder is not writable or has no room for a file.

    Args:
        folder: created if it does not exist.
        needed: size of the file in bytes.
    """
    check_writable(os.path.join(folder, "checkpoint"), "OUTPUT_DIR")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"OUTPUT_DIR {folder}: a checkpoint takes about {needed / 2**20:,.0f} MiB, but only "
            f"{free / 2**20:,.0f} MiB are free; make room or choose another OUTPUT_DIR"
        )


class _StartingCheckpointer(BalancedCheckpointer):
    _path = ""

    def load(self, path: str, *args, **kwargs):
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        names, ours = list(checkpoint["model"]), self.model.state_dict()
        self._convert_ndarray_to_tensor(checkpoint["model"])
        if checkpoint.pop("matching_heuristics", False):
            with _without_warnings("detectron2.checkpoint.c2_model_loading"):
                checkpoint["model"] = align_and_update_state_dicts(
                    ours,
                    checkpoint["model"],
                    c2_conversion=checkpoint.get("__author__") == "Caffe2",
                )
        weights = checkpoint["model"]
        _strip_prefix_if_present(weights, "module.")
        number = len(self.class_names) if self.class_names else finetune.num_classes(ours)
        adapted = finetune.adapt_classes(
            weights,
            ours,
            finetune.class_names_of(checkpoint, number),
            self.class_names,
            finetune.num_classes(weights, _config_of(checkpoint)),
            number,
        )
        for name in adapted.dropped:
            del weights[name]
        weights.update(adapted.tensors)
        fitting = {
            name
            for name, tensor in weights.items()
            if name in ours and tensor.shape == ours[name].shape
        }
        try:
            finetune.check_fits(ours, fitting, names)
        except UserError as error:
            raise UserError(f"{self._path} does not fit the model: {error}") from error
        reshaped = [name for name in weights if name in ours and name not in fitting]
        incompatible = super()._load_model(checkpoint)

        # Frozen batch norm completes the statistics of files that have them in its weights.
        missing = {*incompatible.missing_keys, *reshaped, *adapted.dropped}
        taken = fitting | {
            name
            for name in ours
            if name not in missing and f"{name.rpartition('.')[0]}.weight" in fitting
        }
        left_over = [
            name
            for name in (*incompatible.unexpected_keys, *reshaped, *adapted.dropped)
            if name not in PIXELS
        ]
        logger = logging.getLogger(__name__)
        logger.info(
            f"{self._path}: what the model starts with\n"
            + finetune.report(ours, taken, adapted, left_over)
        )
        if adapted.message:
            logger.warning(f"{self._path}: {adapted.message}")
        backbone = [name for name in ours if finetune.part_of(name) == "backbone"]
        new = sum(name not in taken for name in backbone)
        if new:
            logger.warning(
                f"{self._path}: {new} of the {len(backbone)} tensors of the backbone are not in "
                "it, or of another shape: it may be of another network"
            )
        # None, so that fvcore does not list again, one by one, what is in the table.


@contextmanager
def _without_warnings(name: str):
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _AtomicWrites:
    """A path manager whose files get their names only when they are complete and on disk."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if "w" not in mode or "://" in path:
            return self._path_manager.open(path, mode, **kwargs)
        return open_replacing(path, mode, **kwargs)


def training_in(folder: str) -> str:
    """The name of a checkpoint of the training that a folder holds; "" if it holds none.

    A file that cannot be read may be one.
    """
    readable, unreadable, _ = _checkpoints_in(folder)
    return next(iter([*readable, *unreadable]), "")


class _Saved(NamedTuple):
    iteration: int
    time: float
    """When it was written."""
    seed: Optional[int]
    """Of the order of its images: the same in all checkpoints of a training."""


def _checkpoints_in(folder: str) -> Tuple[Dict[str, _Saved], Dict[str, str], str]:
    """The checkpoints of trainings, those that cannot be read with the reason, and the name in
    ``last_checkpoint``."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pth"))
        last = Path(folder, "last_checkpoint")
        named = os.path.basename(last.read_text().strip()) if last.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return {}, {}, ""
    readable: Dict[str, _Saved] = {}
    unreadable: Dict[str, str] = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            content = _mapped(path)
            if "iteration" in content:  # unlike other weights in the folder
                seed = content.get("trainer", {}).get("loader", {}).get("seed")
                readable[name] = _Saved(content["iteration"], os.path.getmtime(path), seed)
        except READ_ERRORS as error:
            unreadable[name] = _reason(error)
    return readable, unreadable, named


def _mapped(path: str) -> Dict[str, Any]:
    """The content of a file, memory-mapped, so that the values of the tensors are not read."""
    with numpy_allowed():
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _newest(folder: str) -> str:
    """The file that ``last_checkpoint`` names, or else the latest of the same training."""
    readable, unreadable, named = _checkpoints_in(folder)
    problems = [f"{os.path.join(folder, name)} ({why})" for name, why in unreadable.items()]
    if unreadable and not readable:
        raise UserError(
            f"--resume: none of the checkpoints in {folder} can be read: {first_of(problems)}; "
            "repair one, or start again with --overwrite or another OUTPUT_DIR"
        )
    logger = logging.getLogger(__name__)
    for problem in problems:
        logger.warning(f"the checkpoint cannot be read: {problem}")
    if not readable:
        return ""
    if named in readable:
        return os.path.join(folder, named)
    # What was written last is of the latest training, if there were several.
    seed = max(readable.values(), key=lambda saved: saved.time).seed
    of_training = {name: saved for name, saved in readable.items() if saved.seed == seed}
    newest = max(of_training, key=lambda name: of_training[name][:2])
    what = f"names {named}, which does not exist or cannot be read" if named else "names no file"
    logger.warning(f"last_checkpoint {what}: resuming from {newest}")
    return os.path.join(folder, newest)


def _reason(error: BaseException) -> str:
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in causes):
        return "no space left on the disk"
    text = (str(error).splitlines() or [""])[0]
    if " " in text:
        return text
    return f"it is not a checkpoint ({': '.join(filter(None, (type(error).__name__, text)))})"
