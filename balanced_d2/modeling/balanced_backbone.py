"""Balancing of any feature pyramid."""

from typing import Dict

import torch
from detectron2.modeling import Backbone
from torch import nn

from balanced_d2.layers.feature_balancer import FeatureBalancer
from balanced_d2.utils.errors import UserError


class BalancedBackbone(Backbone):
    """A :class:`FeatureBalancer` on the outputs of any backbone that makes a feature pyramid.

    Such as a path aggregation network, ViTDet's ``SimpleFeaturePyramid`` or a BiFPN; for
    Detectron2's own ``FPN`` there is also :class:`BalancedFPN`, whose checkpoints are those of the
    ``FPN`` with a balancer besides. In a LazyConfig::

        model.backbone = L(BalancedBackbone)(backbone=L(SimpleFeaturePyramid)(...), refine_level=2)

    and with a YAML config in a builder that is registered in ``BACKBONE_REGISTRY``.

    Args:
        backbone: the pyramid. Its levels, all outputs that its ``output_shape()`` has, need equal
            channels and a stride each.
        refine_level: index of the level, counted from that of the smallest stride, whose
            resolution the mean of all levels has.
        refine_type, zero_init: as for :class:`FeatureBalancer`.

    Raises:
        UserError: if the levels differ in channels or have no strides, there is no level
            ``refine_level``, or ``refine_type`` is unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        refine_level: int = 2,
        refine_type: str | nn.Module = "non_local",
        zero_init: bool = False,
    ):
        super().__init__()
        shapes = backbone.output_shape()
        channels = {name: shape.channels for name, shape in shapes.items()}
        if len(set(channels.values())) != 1:
            raise UserError(
                f"the levels of {type(backbone).__name__} have different numbers of channels, "
                f"{channels}; balancing needs the same for all"
            )
        strides = {name: shape.stride for name, shape in shapes.items()}
        if None in strides.values():
            raise UserError(
                f"output_shape() of {type(backbone).__name__} does not give the stride of every "
                f"level: {strides}; balancing orders the levels by it"
            )
        self.backbone = backbone
        self._levels = sorted(strides, key=strides.__getitem__)
        num_channels = next(iter(channels.values()))
        self.balancer = FeatureBalancer(num_channels, refine_level, refine_type, zero_init)
        self.balancer.check_levels(len(shapes))

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Args:
            x: images, shape (N, C, H, W).

        Returns:
            The balanced levels by name, from fine to coarse.
        """
        features = self.backbone(x)
        return dict(zip(self._levels, self.balancer([features[name] for name in self._levels])))

    def output_shape(self):
        """The pyramid's, which balancing does not change, from fine to coarse."""
        shapes = self.backbone.output_shape()
        return {name: shapes[name] for name in self._levels}

    @property
    def size_divisibility(self) -> int:
        return self.backbone.size_divisibility

    @property
    def padding_constraints(self) -> Dict[str, int]:
        """What Detectron2's main asks a backbone for besides; version 0.6 does not have it."""
        return getattr(self.backbone, "padding_constraints", {})
