"""Feature pyramid network with balanced outputs."""

from typing import Optional

from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from balanced_d2.layers.feature_balancer import FeatureBalancer


class BalancedFPN(FPN):
    """Detectron2's FPN with a :class:`FeatureBalancer` on its outputs.

    Args:
        bottom_up, in_features, out_channels, top_block, **fpn_args: as for Detectron2's ``FPN``.
        refine_level, refine_type, zero_init: as for :class:`FeatureBalancer`.

    Raises:
        UserError: if ``refine_level`` is not a level of this pyramid or ``refine_type`` unknown.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features,
        out_channels: int,
        *,
        top_block: Optional[nn.Module] = None,
        refine_level: int = 2,
        refine_type: str | nn.Module = "non_local",
        zero_init: bool = False,
        **fpn_args,
    ):
        super().__init__(bottom_up, in_features, out_channels, top_block=top_block, **fpn_args)
        self.balancer = FeatureBalancer(out_channels, refine_level, refine_type, zero_init)
        self.balancer.check_levels(len(self._out_features))

    def forward(self, x):
        """
        Args:
            x: images, shape (N, C, H, W).

        Returns:
            dict[str, Tensor]: balanced levels by name, from fine to coarse, e.g. p2 to p6.
        """
        features = super().forward(x)
        return dict(zip(features, self.balancer(list(features.values()))))


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
