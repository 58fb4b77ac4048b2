"""Feature pyramid network with balanced outputs."""

import types
from typing import Optional

import torch
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from balanced_d2.layers.feature_balancer import FeatureBalancer


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
