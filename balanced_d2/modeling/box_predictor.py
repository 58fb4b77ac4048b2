"""Box predictor of Fast R-CNN heads with Balanced L1 among its regression losses."""

from typing import Tuple

from detectron2.config import configurable
from detectron2.layers import nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

from balanced_d2.modeling.balanced_l1 import (
    balanced_l1_from_config,
    balanced_l1_loss,
    inlier_steepness,
)


class BalancedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's predictor, to which ``box_reg_loss_type="balanced_l1"`` is added.

    Args:
        input_shape, **kwargs: as for Detectron2's ``FastRCNNOutputLayers``.
        balanced_l1: (alpha, gamma, beta) of :func:`balanced_l1_loss`.
    """

    @configurable
    def __init__(
        self, input_shape, *, balanced_l1: Tuple[float, float, float] = (0.5, 1.5, 1.0), **kwargs
    ):
        super().__init__(input_shape, **kwargs)
        inlier_steepness(*balanced_l1)  # refuse wrong values now, not at the first iteration
        alpha, gamma, beta = balanced_l1
        self.balanced_l1 = (alpha, gamma, beta)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "balanced_l1": balanced_l1_from_config(cfg.MODEL.ROI_BOX_HEAD),
        }

    def box_reg_loss(self, proposal_boxes, gt_boxes, pred_deltas, gt_classes):
        """
        Args:
            proposal_boxes, gt_boxes: shape (R, 4), absolute pixels.
            pred_deltas: shape (R, 4) or (R, num_classes * 4).
            gt_classes: shape (R,), class of each proposal, background is ``num_classes``.

        Returns:
            Scalar: the loss summed over the foreground proposals, divided by R.
        """
        if self.box_reg_loss_type != "balanced_l1":
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        foreground = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        box_dim = proposal_boxes.shape[1]
        # One box per class, or one for all classes.
        deltas = pred_deltas.unflatten(1, (-1, box_dim))[foreground]
        if deltas.shape[1] > 1:
            deltas = deltas.gather(1, gt_classes[foreground].view(-1, 1, 1).expand(-1, 1, box_dim))
        target = self.box2box_transform.get_deltas(proposal_boxes[foreground], gt_boxes[foreground])
        loss = balanced_l1_loss(deltas.squeeze(1), target, *self.balanced_l1, reduction="sum")
        return loss / max(gt_classes.numel(), 1)
