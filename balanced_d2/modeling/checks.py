"""Whether a model has the balances that its config turns on."""

from detectron2.config import CfgNode
from torch import nn

from balanced_d2.layers import FeatureBalancer
from balanced_d2.layers.box_losses import DETECTRON2_LOSSES
from balanced_d2.layers.class_losses import CROSS_ENTROPY
from balanced_d2.modeling.balanced_sampling import BalancedSamplingMixin
from balanced_d2.modeling.box_predictor import BalancedFastRCNNOutputLayers
from balanced_d2.modeling.roi_heads import CANONICAL, BalancedBoxLossMixin
from balanced_d2.utils.errors import UserError


def check_balanced(cfg: CfgNode, model: nn.Module) -> None:
    """Raise :class:`UserError` if a backbone or RoI heads of others ignore a balance that is on.

    What Detectron2's own ignore is known before anything is built
    (:func:`balanced_d2.config.checks.check_config`).
    """
    modules = list(model.modules())
    backbone, heads = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS
    if cfg.MODEL.BALANCED_FPN.ENABLED and not _any(modules, FeatureBalancer):
        raise UserError(
            f"MODEL.BALANCED_FPN.ENABLED is True, but MODEL.BACKBONE.NAME {backbone} builds no "
            "FeatureBalancer; add one to it, or set ENABLED to False"
        )
    for key in ("NEGATIVE_SAMPLER", "POSITIVE_SAMPLER"):
        if heads[key] != "random" and not _any(modules, BalancedSamplingMixin):
            raise UserError(
                f"MODEL.ROI_HEADS.{key} is {heads[key]!r}, which MODEL.ROI_HEADS.NAME {heads.NAME} "
                "does not know; derive it from BalancedSamplingMixin, too"
            )
    box_head = cfg.MODEL.ROI_BOX_HEAD
    for key, detectron2s in (
        ("CLS_LOSS_TYPE", (CROSS_ENTROPY,)),
        ("BBOX_REG_LOSS_TYPE", DETECTRON2_LOSSES),
    ):
        if box_head[key] not in detectron2s and not _any(modules, BalancedFastRCNNOutputLayers):
            raise UserError(
                f"MODEL.ROI_BOX_HEAD.{key} is {box_head[key]!r}, which MODEL.ROI_HEADS.NAME "
                f"{heads.NAME} does not know; derive it from BalancedBoxLossMixin, too, or give "
                "it a BalancedFastRCNNOutputLayers as box predictor"
            )
    for key, default in CANONICAL.items():
        if box_head[key] != default and not _any(modules, BalancedBoxLossMixin):
            raise UserError(
                f"MODEL.ROI_BOX_HEAD.{key} is {box_head[key]}, which MODEL.ROI_HEADS.NAME "
                f"{heads.NAME} does not know; derive it from BalancedBoxLossMixin, too"
            )


def _any(modules, cls) -> bool:
    return any(isinstance(module, cls) for module in modules)
