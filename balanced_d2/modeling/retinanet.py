"""RetinaNet with any registered regression loss."""

from typing import Optional

import torch
from detectron2.config import configurable
from detectron2.layers import cat, nonzero_tuple
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.structures import Boxes, Instances

from balanced_d2.layers.box_losses import BoxRegLoss, box_reg_losses, build_box_reg_loss


@META_ARCH_REGISTRY.register()
class BalancedRetinaNet(RetinaNet):
    """Detectron2's RetinaNet, which takes a regression loss from outside.

    Args:
        box_reg_loss: the loss of box deltas, such as :class:`BalancedL1`; None: Detectron2's own,
            by its ``box_reg_loss_type``.
        clip_before_nms: whether boxes are clipped to the image before non-maximum suppression, as
            MMDetection does, and not only after it.
        **kwargs: as for Detectron2's ``RetinaNet``.
    """

    @configurable
    def __init__(
        self,
        *,
        box_reg_loss: Optional[BoxRegLoss] = None,
        clip_before_nms: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.regression_loss = box_reg_loss
        self.clip_before_nms = clip_before_nms

    @classmethod
    def from_config(cls, cfg):
        loss = build_box_reg_loss(cfg.MODEL.RETINANET)
        arguments = super().from_config(cfg)
        if loss is not None:  # whose name Detectron2 does not know
            arguments["box_reg_loss_type"] = "smooth_l1"
        return {
            **arguments,
            "box_reg_loss": loss,
            "clip_before_nms": cfg.MODEL.RETINANET.CLIP_BEFORE_NMS,
        }

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        """
        Args:
            anchors: the Boxes of each level, together R of them.
            pred_logits, pred_anchor_deltas: of each level, shape (N, Hi * Wi * Ai, K or 4).
            gt_labels, gt_boxes: of each image, shapes (R,) and (R, 4): the class, ``num_classes``
                for background and -1 for ignored anchors, and the matched box.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, summed and divided by the (running mean of the)
            number of foreground anchors.
        """
        losses = super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        if self.regression_loss is None:
            return losses
        # Detectron2 has the loss in a function that cannot be extended: its own, of the values that
        # are there anyway, is replaced.
        labels = torch.stack(gt_labels)
        # Indices and not a mask, for which the host would wait each time that it is used.
        image, anchor = nonzero_tuple((labels >= 0) & (labels != self.num_classes))
        target = self.box2box_transform.get_deltas(
            Boxes.cat(anchors).tensor[anchor], torch.stack(gt_boxes)[image, anchor]
        )
        deltas = cat(pred_anchor_deltas, dim=1)[image, anchor]
        loss = box_reg_losses(self.regression_loss, deltas, target).sum()
        return {**losses, "loss_box_reg": loss / self.loss_normalizer}

    def _decode_per_level_predictions(self, *args, **kwargs) -> Instances:
        predictions = super()._decode_per_level_predictions(*args, **kwargs)
        if not self.clip_before_nms:
            return predictions
        predictions.pred_boxes.clip(predictions.image_size)
        return predictions[predictions.pred_boxes.nonempty()]
