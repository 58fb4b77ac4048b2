"""RoI heads that sample their proposals, and learn boxes and classes, in a balanced way."""

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Dict, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.structures import Instances
from torch import nn

from balanced_d2.layers.box_losses import build_box_reg_loss
from balanced_d2.layers.class_losses import CROSS_ENTROPY
from balanced_d2.modeling.balanced_sampling import BalancedSamplingMixin
from balanced_d2.modeling.box_predictor import BalancedFastRCNNOutputLayers
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.mix_in import check_order

# Keys of MODEL.ROI_BOX_HEAD, with the values that Detectron2's own heads have.
CANONICAL = {"CANONICAL_BOX_SIZE": 224, "CANONICAL_LEVEL": 4}


class BalancedBoxLossMixin:
    """Any registered loss of boxes and classes, and the levels of the poolers, for a
    ``StandardROIHeads``.

    By config: ``MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE``, ``CLS_LOSS_TYPE``, ``CANONICAL_BOX_SIZE``
    and ``CANONICAL_LEVEL``, the last two for masks and keypoints too.

    Raises:
        TypeError: when a class is defined that has it after the ``StandardROIHeads``.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        check_order(cls, BalancedBoxLossMixin, StandardROIHeads)

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
        if "box_predictor" in ret:
            ret["box_predictor"] = _balanced(cfg, ret["box_head"], ret["box_predictor"])
        else:  # a cascade
            ret["box_predictors"] = [
                _balanced(cfg, head, predictor)
                for head, predictor in zip(ret["box_heads"], ret["box_predictors"])
            ]
        return ret


def _balanced(
    cfg: CfgNode, box_head: nn.Module, predictor: FastRCNNOutputLayers
) -> BalancedFastRCNNOutputLayers:
    """Our predictor in the place of Detectron2's. With Detectron2's losses it begins with its very
    weights, and no random number is drawn besides."""
    node = cfg.MODEL.ROI_BOX_HEAD
    is_plain = build_box_reg_loss(node) is None and node.CLS_LOSS_TYPE == CROSS_ENTROPY
    with torch.random.fork_rng(devices=[], enabled=is_plain):
        balanced = BalancedFastRCNNOutputLayers(
            cfg, box_head.output_shape, box2box_transform=predictor.box2box_transform
        )
    if is_plain:
        balanced.load_state_dict(predictor.state_dict())
    return balanced


if TYPE_CHECKING:  # to type checkers, what a mixin uses is that of the class it is mixed into
    from detectron2.modeling.roi_heads import StandardROIHeads as _Mixin
else:
    _Mixin = object


class CandidateLossesMixin(_Mixin):
    """The losses of all proposals for samplers that need them, for a ``StandardROIHeads`` or, by
    its first stage, a ``CascadeROIHeads``."""

    @property
    def offers_losses(self) -> bool:
        return all(hasattr(p, "proposal_losses") for p in _stages(self.box_predictor))

    @torch.no_grad()
    def candidate_losses(
        self, features: Dict[str, torch.Tensor], candidates: List[Instances]
    ) -> List[torch.Tensor]:
        """See :meth:`BalancedSamplingMixin.candidate_losses`."""
        box_head, predictor = _stages(self.box_head)[0], _stages(self.box_predictor)[0]
        with _evaluating(box_head):
            pooled = self.box_pooler(
                [features[name] for name in self.box_in_features],
                [image.proposal_boxes for image in candidates],
            )
            losses = predictor.proposal_losses(predictor(box_head(pooled)), candidates)
        # Older versions of PyTorch would train with the weights cast here, without a gradient.
        torch.clear_autocast_cache()
        return list(losses.split([len(image) for image in candidates]))


def _stages(part: nn.Module) -> List[Any]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within it a module is in evaluation mode, so that what it sees changes no statistics."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


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
class BalancedROIHeads(
    CandidateLossesMixin, BalancedSamplingMixin, BalancedBoxLossMixin, StandardROIHeads
):
    """Detectron2's ``StandardROIHeads`` with balanced sampling and losses (by config).

    Args: see :class:`BalancedSamplingMixin`; the others are those of ``StandardROIHeads``.
    """


@ROI_HEADS_REGISTRY.register()
class BalancedCascadeROIHeads(
    CandidateLossesMixin, BalancedSamplingMixin, BalancedBoxLossMixin, CascadeROIHeads
):
    """Detectron2's ``CascadeROIHeads`` with both: sampling in the first stage, the losses in all.

    The later stages take all boxes of the one before, so there is nothing to sample.

    Args: see :class:`BalancedSamplingMixin`; the others are those of ``CascadeROIHeads``.
    """
