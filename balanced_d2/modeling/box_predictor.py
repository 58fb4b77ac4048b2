"""Box predictor of Fast R-CNN heads with any registered regression loss."""

from typing import Optional

from detectron2.config import configurable
from detectron2.layers import nonzero_tuple
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers

from balanced_d2.layers.box_losses import BoxRegLoss, build_box_reg_loss


class BalancedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's predictor, which takes a regression loss from outside.

    Args:
        input_shape, **kwargs: as for Detectron2's ``FastRCNNOutputLayers``.
        box_reg_loss: the loss of box deltas, such as :class:`BalancedL1`; None: Detectron2's own,
            by its ``box_reg_loss_type``.
    """

    @configurable
    def __init__(self, input_shape, *, box_reg_loss: Optional[BoxRegLoss] = None, **kwargs):
        super().__init__(input_shape, **kwargs)
        self.regression_loss = box_reg_loss

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "box_reg_loss": build_box_reg_loss(cfg.MODEL.ROI_BOX_HEAD),
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
        if self.regression_loss is None:
            return super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        foreground = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))[0]
        box_dim = proposal_boxes.shape[1]
        # One box per class, or one for all classes.
        deltas = pred_deltas.unflatten(1, (-1, box_dim))[foreground]
        if deltas.shape[1] > 1:
            deltas = deltas.gather(1, gt_classes[foreground].view(-1, 1, 1).expand(-1, 1, box_dim))
        target = self.box2box_transform.get_deltas(proposal_boxes[foreground], gt_boxes[foreground])
        loss = self.regression_loss(deltas.squeeze(1), target).sum()
        return loss / max(gt_classes.numel(), 1)
