"""Feature pyramid network with balanced outputs, and its builders."""

import types
from typing import Optional

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from balanced_d2.errors import UserError
from balanced_d2.modeling.feature_balancer import FeatureBalancer


def _named(name: str, method: types.FunctionType) -> types.FunctionType:
    """The same method under another name."""
    return types.FunctionType(
        method.__code__, method.__globals__, name, method.__defaults__, method.__closure__
    )


class BalancedFPN(FPN):
    """Detectron2's FPN with a :class:`FeatureBalancer` on its outputs.

    Args:
        bottom_up, in_features, out_channels, top_block, **fpn_args: as for Detectron2's ``FPN``.
        refine_level, refine_type: as for :class:`FeatureBalancer`.

    Raises:
        UserError: if ``refine_level`` is not a level of this pyramid or ``refine_type`` unknown.
    """

    # TorchScript compiles no super(), and a method by its own name only.
    _unbalanced_forward = _named("_unbalanced_forward", FPN.forward)

    def __init__(
        self,
        bottom_up: Backbone,
        in_features,
        out_channels: int,
        *,
        top_block: Optional[nn.Module] = None,
        refine_level: int = 2,
        refine_type: str | nn.Module = "non_local",
        **fpn_args,
    ):
        super().__init__(bottom_up, in_features, out_channels, top_block=top_block, **fpn_args)
        self.balancer = FeatureBalancer(out_channels, refine_level, refine_type)
        self.balancer.check_levels(len(self._out_features))
        # The gradient of a top block needs what it reads, its own levels included, as it is.
        read = {getattr(top_block, "in_feature", None), *self._out_features[len(in_features) :]}
        self._inplace_with_gradient = read.isdisjoint(self._out_features[:refine_level])

    def forward(self, x):
        """
        Args:
            x: images, shape (N, C, H, W).

        Returns:
            dict[str, Tensor]: balanced levels by name, from fine to coarse, e.g. p2 to p6.
        """
        features = self._unbalanced_forward(x)
        # The levels are this module's own.
        inplace = self._inplace_with_gradient or not torch.is_grad_enabled()
        balanced = self.balancer(list(features.values()), inplace)
        return dict(zip(features.keys(), balanced))


class P6P7(LastLevelP6P7):
    """RetinaNet's two extra levels, with or without a ReLU between them.

    Args:
        in_channels, out_channels, in_feature: as for Detectron2's ``LastLevelP6P7``.
        relu: whether P7 is computed from P6 after a ReLU, as Detectron2 has it, or from P6 itself,
            as MMDetection does.
    """

    def __init__(
        self, in_channels: int, out_channels: int, in_feature: str = "res5", *, relu: bool = True
    ):
        super().__init__(in_channels, out_channels, in_feature)
        self.relu = relu

    def forward(self, x):
        if self.relu:
            return super().forward(x)
        p6 = self.p6(x)
        return [p6, self.p7(p6)]


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
    )


def _build_p2_to_p6(cfg, bottom_up: Backbone) -> FPN:
    return _build_fpn(cfg, bottom_up, LastLevelMaxPool())


def _build_p3_to_p7(cfg, bottom_up: Backbone) -> FPN:
    coarsest = cfg.MODEL.FPN.IN_FEATURES[-1]
    channels = bottom_up.output_shape()[coarsest].channels
    top_block = P6P7(
        channels, cfg.MODEL.FPN.OUT_CHANNELS, coarsest, relu=cfg.MODEL.BALANCED_FPN.P7_RELU
    )
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
