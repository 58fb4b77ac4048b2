"""The configs of this project by name, as ``detectron2.model_zoo`` has Detectron2's.

::

    from balanced_d2 import model_zoo

    cfg = model_zoo.get_config("Aquarium/balanced_faster_rcnn_lite0_FPN_1x.yaml")
    model = model_zoo.get("COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.py")
"""

from typing import Optional

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn

from balanced_d2.checkpoint import start_from
from balanced_d2.config.lazy import as_read, read_config
from balanced_d2.config.zoo import config_names, get_config_file
from balanced_d2.engine import trainer_for
from balanced_d2.engine.speed import use_available_device
from balanced_d2.utils.errors import UserError

__all__ = ["config_names", "get", "get_config", "get_config_file"]


def get_config(config_path: str, trained: bool = False) -> CfgNode | DictConfig:
    """The config of a file, with Detectron2's and this project's defaults.

    Args:
        config_path: as for :func:`get_config_file`.
        trained: for Detectron2's interface; there are no trained weights yet.

    Returns:
        A ``CfgNode`` for YAML, a LazyConfig for Python.

    Raises:
        UserError: if there is none of that name, or ``trained`` is True.
    """
    return as_read(_read(config_path, trained))


def get(config_path: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """The model of a config, with the weights that its training starts from.

    Args:
        config_path, trained: as for :func:`get_config`.
        device: by default that of the config, or the CPU where there is no CUDA.

    Returns:
        The model, in training mode as with Detectron2.

    Raises:
        UserError: as :func:`get_config`, and if the weights cannot be read or do not fit.
    """
    cfg = _read(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    use_available_device(cfg)
    model = trainer_for(cfg).build_model(cfg)
    start_from(model, cfg.MODEL.WEIGHTS)
    return model


def _read(config_path: str, trained: bool) -> CfgNode:
    file = get_config_file(config_path)
    if trained:
        raise UserError(
            f"{config_path} has no trained weights: none have been published; balanced-d2 "
            "convert-mmdet and balanced-d2 convert-torchvision convert those of other projects"
        )
    return read_config(file)
