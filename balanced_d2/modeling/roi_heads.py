"""RoI heads that sample their proposals, and regress their boxes, in a balanced way."""

from typing import Any, Dict

from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads, StandardROIHeads

from balanced_d2.layers.box_losses import build_box_reg_loss
from balanced_d2.modeling.balanced_sampling import BalancedSamplingMixin
from balanced_d2.modeling.box_predictor import BalancedFastRCNNOutputLayers
from balanced_d2.utils.errors import UserError


class BalancedBoxLossMixin:
    """Any registered box loss, and the levels of the poolers, for a ``StandardROIHeads``.

    By config: ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE``, ``CANONICAL_BOX_SIZE`` and
    ``CANONICAL_LEVEL``, the last two for masks and keypoints too.
    """

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        # What super() has is the other base class's.
        head = super()._init_mask_head(cfg, input_shape)  # type: ignore[misc]
        return _with_canonical_box(cfg, head)

    @classmethod
    def _init_keypoint_head(cls, cfg, input_shape):
        head = super()._init_keypoint_head(cfg, input_shape)  # type: ignore[misc]
        return _with_canonical_box(cfg, head)

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        ret = super()._init_box_head(cfg, input_shape)  # type: ignore[misc]
        ret = _with_canonical_box(cfg, ret)
        if build_box_reg_loss(cfg.MODEL.ROI_BOX_HEAD) is None:  # Detectron2's own
            return ret
        if "box_predictor" in ret:
            ret["box_predictor"] = BalancedFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        else:  # a cascade, whose predictors differ in their transform
            ret["box_predictors"] = [
                BalancedFastRCNNOutputLayers(
                    cfg, head.output_shape, box2box_transform=predictor.box2box_transform
                )
                for head, predictor in zip(ret["box_heads"], ret["box_predictors"])
            ]
        return ret


def _with_canonical_box(cfg: CfgNode, head: Dict[str, Any]) -> Dict[str, Any]:
    node = cfg.MODEL.ROI_BOX_HEAD
    if node.CANONICAL_BOX_SIZE <= 0:
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE is {node.CANONICAL_BOX_SIZE}; it has to be "
            "above 0"
        )
    for part in head.values():
        if isinstance(part, ROIPooler):
            part.canonical_box_size = node.CANONICAL_BOX_SIZE
            part.canonical_level = node.CANONICAL_LEVEL
    return head


@ROI_HEADS_REGISTRY.register()
class BalancedROIHeads(BalancedSamplingMixin, BalancedBoxLossMixin, StandardROIHeads):
    """Detectron2's ``StandardROIHeads`` with balanced sampling and Balanced L1 (by config).

    Args: see :class:`BalancedSamplingMixin`; the others are those of ``StandardROIHeads``.
    """


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(BalancedSamplingMixin, BalancedBoxLossMixin, CascadeROIHeads):
    """Detectron2's ``CascadeROIHeads`` with both: sampling in the first stage, the loss in all.

    The later stages take all boxes of the one before, so there is nothing to sample.

    Args: see :class:`BalancedSamplingMixin`; the others are those of ``CascadeROIHeads``.
    """
