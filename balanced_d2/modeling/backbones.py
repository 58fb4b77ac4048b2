"""Builders of backbones with a balanced feature pyramid, for ``MODEL.BACKBONE.NAME``."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from balanced_d2.modeling.balanced_fpn import P6P7, BalancedFPN
from balanced_d2.utils.errors import UserError


def _build_fpn(cfg, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    fpn_args = {
        "bottom_up": bottom_up,
        "in_features": cfg.MODEL.FPN.IN_FEATURES,
        "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "norm": cfg.MODEL.FPN.NORM,
        "top_block": top_block,
        "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
    }
    if not cfg.MODEL.BALANCED_FPN.ENABLED:
        return FPN(**fpn_args)
    return BalancedFPN(
        **fpn_args,
        refine_level=cfg.MODEL.BALANCED_FPN.REFINE_LEVEL,
        refine_type=cfg.MODEL.BALANCED_FPN.REFINE_TYPE,
        zero_init=cfg.MODEL.BALANCED_FPN.ZERO_INIT,
    )


def _check_features(cfg, bottom_up: Backbone) -> None:
    features = list(bottom_up.output_shape())
    missing = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in features]
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES: the backbone below the pyramid, {type(bottom_up).__name__}, "
            f"has no {', '.join(missing)}; it has {', '.join(features)}"
        )


def _build_p2_to_p6(cfg, bottom_up: Backbone) -> FPN:
    _check_features(cfg, bottom_up)
    return _build_fpn(cfg, bottom_up, LastLevelMaxPool())


def _build_p3_to_p7(cfg, bottom_up: Backbone) -> FPN:
    _check_features(cfg, bottom_up)
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    if cfg.MODEL.BALANCED_FPN.P6_FROM_P5:
        read, channels = "p5", out_channels
    else:
        read = cfg.MODEL.FPN.IN_FEATURES[-1]
        channels = bottom_up.output_shape()[read].channels
    top_block = P6P7(channels, out_channels, read, relu=cfg.MODEL.BALANCED_FPN.P7_RELU)
    return _build_fpn(cfg, bottom_up, top_block)


def _build_bottom_up(cfg, input_shape: ShapeSpec) -> Backbone:
    name = cfg.MODEL.BALANCED_FPN.BOTTOM_UP
    if name not in BACKBONE_REGISTRY:
        raise UserError(
            f"MODEL.BALANCED_FPN.BOTTOM_UP: there is no backbone {name!r}; it has to be registered "
            "in Detectron2's BACKBONE_REGISTRY"
        )
    return BACKBONE_REGISTRY.get(name)(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_balanced_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet with a balanced P2-P6, as ``build_resnet_fpn_backbone`` but for the balancing."""
    return _build_p2_to_p6(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_balanced_retinanet_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """ResNet with a balanced P3-P7, as ``build_retinanet_resnet_fpn_backbone`` otherwise."""
    return _build_p3_to_p7(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_balanced_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Balanced P2-P6 on the registered backbone that ``MODEL.BALANCED_FPN.BOTTOM_UP`` names."""
    return _build_p2_to_p6(cfg, _build_bottom_up(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_balanced_retinanet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Balanced P3-P7 on the registered backbone that ``MODEL.BALANCED_FPN.BOTTOM_UP`` names."""
    return _build_p3_to_p7(cfg, _build_bottom_up(cfg, input_shape))
