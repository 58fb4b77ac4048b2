"""Balanced feature pyramid (Libra R-CNN, section 3.2): gather, refine, scatter."""

from collections import OrderedDict
from functools import partial
from typing import List, Sequence

import torch
from torch import nn

from balanced_d2.layers.non_local import NonLocal2d
from balanced_d2.layers.rescale import adaptive_max_pool, add_nearest, nearest
from balanced_d2.utils.errors import UserError
from balanced_d2.utils.registry import Registry

REFINEMENTS = Registry("REFINEMENTS", "MODEL.BALANCED_FPN.REFINE_TYPE")
"""Modules, or what makes them from the number of channels: (N, C, H, W) to the same shape."""


@REFINEMENTS.register(name="none")
def _build_none(channels: int) -> nn.Module:
    return nn.Identity()


@REFINEMENTS.register(name="conv")
def _build_conv(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    # As Detectron2's FPN does, whose c2_xavier_fill this is.
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU()))


REFINEMENTS.register(NonLocal2d, name="non_local")
REFINEMENTS.register(partial(NonLocal2d, pool_keys=True), name="non_local_pooled")


class FeatureBalancer(nn.Module):
    """Give every level of a feature pyramid the same balanced share of all levels.

    All levels are rescaled to the resolution of one of them and averaged; the mean is refined,
    rescaled back to every level and added to it. Rescaling is adaptive max pooling from a finer
    and nearest-neighbour interpolation from a coarser level.

    Args:
        in_channels: number of channels of every level.
        refine_level: index of the level, counted from the finest, whose resolution the mean has
            (2 for P2-P6 and 1 for P3-P7: stride 16 in both).
        refine_type: what refines the mean: ``"none"``, ``"conv"`` (3x3 convolution and ReLU),
            ``"non_local"`` (:class:`NonLocal2d`, the paper's), ``"non_local_pooled"`` (the same
            with pooled keys, cheaper) or another entry of ``REFINEMENTS``; or a module.
        zero_init: whether the refined mean is multiplied by a learnt factor for each channel that
            starts at zero, so that balancing starts as the identity and the weights of a plain
            detector fit at once.

    Raises:
        UserError: on an unknown ``refine_type``, one that is no module or a negative
            ``refine_level``.
    """

    def __init__(
        self,
        in_channels: int,
        refine_level: int = 2,
        refine_type: str | nn.Module = "non_local",
        zero_init: bool = False,
    ):
        super().__init__()
        if refine_level < 0:
            raise UserError(
                f"refine_level (MODEL.BALANCED_FPN.REFINE_LEVEL) is {refine_level}; it counts the "
                "pyramid's levels from 0, the finest"
            )
        self.refine_level = refine_level
        if isinstance(refine_type, str):
            REFINEMENTS.check(refine_type)
            self.refine = REFINEMENTS.get(refine_type)(in_channels)
        elif isinstance(refine_type, nn.Module):
            self.refine = refine_type
        else:
            raise UserError(f"refine_type is {refine_type!r}; give its name, or a module")
        self.scale = nn.Parameter(torch.zeros(in_channels, 1, 1)) if zero_init else None

    def check_levels(self, num_levels: int) -> None:
        """Raise :class:`UserError` if a pyramid of ``num_levels`` has no level to refine at."""
        if self.refine_level >= num_levels:
            raise UserError(
                f"refine_level (MODEL.BALANCED_FPN.REFINE_LEVEL) is {self.refine_level}, but the "
                f"pyramid has {num_levels} levels; choose 0 to {num_levels - 1}"
            )

    def forward(self, features: Sequence[torch.Tensor]) -> List[torch.Tensor]:
        """
        Args:
            features: the levels from fine to coarse, each of shape (N, in_channels, H_i, W_i).
                They stay as they are.

        Returns:
            The balanced levels, of the same shapes.

        Raises:
            UserError: if there is no level ``refine_level``, or, in training mode, if the
                refinement changes the shape.
        """
        self.check_levels(len(features))
        level = self.refine_level
        finer, refined, coarser = features[:level], features[level], features[level + 1 :]
        gathered = [adaptive_max_pool(x, refined) for x in finer]
        gathered += [refined, *(nearest(x, refined) for x in coarser)]
        mean = sum(gathered[1:], gathered[0]) / len(features)
        balanced = self.refine(mean)
        if self.training and balanced.shape != mean.shape:  # which the sums might still take
            raise UserError(
                f"the refinement {type(self.refine).__name__} (MODEL.BALANCED_FPN.REFINE_TYPE) "
                f"makes {tuple(balanced.shape)} of {tuple(mean.shape)}; it has to keep the shape"
            )
        if self.scale is not None:
            # In mixed precision, levels stay in the type that they have.
            balanced = balanced * self.scale.to(balanced.dtype)
        return [
            *(add_nearest(x, balanced) for x in finer),
            refined + balanced,
            *(x + adaptive_max_pool(balanced, x) for x in coarser),
        ]
