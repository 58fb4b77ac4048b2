"""Where the config and the weights of a trained model are."""

import os
from pathlib import Path
from typing import Tuple

from torch import nn

from balanced_d2.checkpoint import BalancedCheckpointer
from balanced_d2.utils.errors import UserError

CONFIGS = (".yaml", ".yml", ".py")
CHECKPOINTS = (".pth", ".pkl")
BEST = "model_best.pth"


def is_exported(source: str) -> bool:
    """Whether a source is an exported file: neither a training nor one of its files."""
    return not os.path.isdir(source) and not source.lower().endswith(CONFIGS + CHECKPOINTS)


def config_and_weights(source: str, weights: str = "") -> Tuple[str, str]:
    """The files of a trained model.

    Args:
        source: the folder of a training, a checkpoint in one, or a YAML config.
        weights: a checkpoint, of a training also the name of one in its folder. By default, that of
            the config, or the last one of a training.

    Returns:
        The config's path or name in the model zoo, and the weights; ``""``: the config's own.

    Raises:
        UserError: if they are not there.
    """
    if os.path.isdir(source):
        return _config_in(source), _checkpoint_in(source, weights)
    if source.lower().endswith(CHECKPOINTS):
        if not os.path.isfile(source):
            raise UserError(f"there is no file {source}")
        if weights:
            raise UserError(f"{source} is a checkpoint: give no other weights with it")
        return _config_in(os.path.dirname(source) or "."), source
    return source, weights


def _config_in(folder: str) -> str:
    config = Path(folder, "config.yaml")
    if not config.is_file():
        raise UserError(
            f"{folder} is not the folder of a training: it has no config.yaml; give the config and "
            "the weights"
        )
    if "_target_:" in config.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{config} was written by a training from a LazyConfig, which can be trained and "
            "evaluated; detection needs a YAML config"
        )
    return str(config)


def _checkpoint_in(folder: str, name: str) -> str:
    if name:
        inside = os.path.join(folder, name)
        return inside if os.path.isfile(inside) else name
    last = BalancedCheckpointer(nn.Module(), folder).get_checkpoint_file()
    best = os.path.join(folder, BEST)
    if not last and not os.path.isfile(best):
        raise UserError(f"the training in {folder} has no checkpoint yet")
    return last or best
