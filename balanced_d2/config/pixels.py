"""The pixels that the weights of a backbone expect: mean, deviation and order of channels."""

import logging
from typing import Dict, Optional

from detectron2.config import CfgNode, get_cfg

from balanced_d2.modeling.feature_backbone import Pixels
from balanced_d2.modeling.timm_backbone import timm_pixels
from balanced_d2.modeling.torchvision_backbone import torchvision_pixels

BUILDERS_ON_A_BOTTOM_UP = ("build_balanced_fpn_backbone", "build_balanced_retinanet_fpn_backbone")


def complete_pixels(cfg: CfgNode) -> None:
    """Set ``PIXEL_MEAN``, ``PIXEL_STD`` and ``INPUT.FORMAT`` for a pretrained backbone of timm or
    torchvision, where they have Detectron2's defaults; warn where they have other values."""
    pixels = _pixels(cfg)
    if pixels is None:
        return
    defaults = get_cfg()
    present = _values(cfg)
    if present == _values(defaults):
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = pixels
        return
    wanted = dict(zip(present, (list(pixels.mean), list(pixels.std), pixels.format)))
    others = [
        f"{key} is {present[key]}, not {wanted[key]}"
        for key in wanted
        if _differ(present[key], wanted[key])
    ]
    if others:
        logging.getLogger(__name__).warning(
            "the config has other pixels than the weights of the backbone were trained with: "
            + "; ".join(others)
        )


def _pixels(cfg: CfgNode) -> Optional[Pixels]:
    name = cfg.MODEL.BACKBONE.NAME
    if name in BUILDERS_ON_A_BOTTOM_UP:
        name = cfg.MODEL.BALANCED_FPN.BOTTOM_UP
    if name == "build_timm_backbone":
        node, pixels = cfg.MODEL.TIMM, timm_pixels
    elif name == "build_torchvision_backbone":
        node, pixels = cfg.MODEL.TORCHVISION, torchvision_pixels
    else:
        return None
    return pixels(node.NAME) if node.PRETRAINED or node.WEIGHTS else None


def _values(cfg: CfgNode) -> Dict[str, object]:
    return {
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
    }


def _differ(a, b) -> bool:
    if isinstance(a, str):
        return a != b
    return any(abs(x - y) > 0.51 for x, y in zip(a, b))
