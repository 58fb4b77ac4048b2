"""Regression losses of boxes, chosen by name: for R-CNN, cascades and RetinaNet alike."""

from typing import Any, Callable, Optional

import torch

from balanced_d2.utils.errors import UserError
from balanced_d2.utils.registry import Registry, name_of

BoxRegLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Predicted and wanted box deltas of R foreground boxes, (R, 4) each, to losses, (R, 4) or (R,)."""

# Detectron2's own, which it computes itself.
DETECTRON2_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
BOX_REG_LOSSES = Registry(
    "BOX_REG_LOSSES",
    "BBOX_REG_LOSS_TYPE (of MODEL.ROI_BOX_HEAD or MODEL.RETINANET)",
    DETECTRON2_LOSSES,
)
"""Regression losses of boxes: each a ``BoxRegLoss``, or a class of such."""


def build_box_reg_loss(node: Any) -> Optional[BoxRegLoss]:
    """The loss that ``MODEL.ROI_BOX_HEAD`` or ``MODEL.RETINANET`` asks for; None: Detectron2's own.

    Raises:
        UserError: if there is none of that name, or a parameter is wrong.
    """
    name = node.BBOX_REG_LOSS_TYPE
    BOX_REG_LOSSES.check(name)
    return None if name in DETECTRON2_LOSSES else BOX_REG_LOSSES.build(name, node)


def box_reg_losses(loss: BoxRegLoss, deltas: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``loss(deltas, targets)``.

    Raises:
        UserError: if it is reduced.
    """
    losses = loss(deltas, targets)
    if losses.shape[:1] != deltas.shape[:1]:
        raise UserError(
            f"the regression loss {name_of(loss)} returned the shape "
            f"{tuple(losses.shape)} for the deltas of {len(deltas)} boxes; it must not be "
            f"reduced: ({len(deltas)}, 4) or ({len(deltas)},) is needed"
        )
    return losses
