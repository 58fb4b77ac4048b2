"""Regression losses of boxes, chosen by name: for R-CNN, cascades and RetinaNet alike."""

from typing import Any, Callable, Optional

import torch

from balanced_d2.utils.registry import Registry

BoxRegLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Predicted and wanted box deltas of R foreground boxes, (R, 4) each, to losses, (R, 4) or (R,)."""

# Detectron2's own, which it computes itself.
DETECTRON2_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
BOX_REG_LOSSES = Registry(
    "BOX_REG_LOSSES",
    "BBOX_REG_LOSS_TYPE (of MODEL.ROI_BOX_HEAD or MODEL.RETINANET)",
    DETECTRON2_LOSSES,
)
"""Regression losses of boxes: each a ``BoxRegLoss``, or a class of such with ``from_config``."""


def build_box_reg_loss(node: Any) -> Optional[BoxRegLoss]:
    """The loss that ``MODEL.ROI_BOX_HEAD`` or ``MODEL.RETINANET`` asks for; None: Detectron2's own.

    Raises:
        UserError: if there is none of that name, or a parameter is wrong.
    """
    name = node.BBOX_REG_LOSS_TYPE
    BOX_REG_LOSSES.check(name)
    return None if name in DETECTRON2_LOSSES else BOX_REG_LOSSES.build(name, node)
