"""Networks of other libraries as Detectron2's backbones: names, strides, frozen stages, pixels."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from balanced_d2.utils.errors import UserError


class Pixels(NamedTuple):
    """How a network's weights expect an image, as Detectron2's keys say it."""

    mean: List[float]
    """``MODEL.PIXEL_MEAN``, of 0 to 255."""
    std: List[float]
    """``MODEL.PIXEL_STD``."""
    format: str
    """``INPUT.FORMAT``: "RGB" or "BGR"."""


class FeatureBackbone(Backbone):
    """A network that gives feature maps of rising strides, under the names that ResNets have.

    Args:
        network: gives a list of maps for a batch of images.
        channels, strides: of each of its maps.
        out_features: which of them the backbone gives: "stem" has stride 2, "res2" 4, "res3" 8,
            "res4" 16 and "res5" 32.
        stages: the names of the network's modules that end in these maps, as ``FREEZE_AT`` counts
            them.
        freeze_at: how many stages are frozen, by stride as in ResNets: 0 none, 1 up to stride 2, 2
            up to stride 4, and so on.
        freeze_norm: freezes the batch norm in a module, and returns it.
        norm: of the stages that are trained: "FrozenBN" (statistics and factors of the weights), or
            "BN".

    Raises:
        UserError: if the network has no such feature, or ``norm`` is unknown.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        out_features: Sequence[str],
        *,
        stages: Sequence[str],
        freeze_at: int,
        freeze_norm: Callable[[nn.Module], nn.Module],
        norm: str,
    ):
        super().__init__()
        if norm not in ("FrozenBN", "BN"):
            raise UserError(f"unknown norm {norm!r} of a backbone; choose one of: FrozenBN, BN")
        self._names = [_name(stride) for stride in strides]
        missing = [name for name in out_features if name not in self._names]
        if missing:
            raise UserError(
                f"the backbone has no feature {' and no '.join(missing)} (MODEL.FPN.IN_FEATURES); "
                f"it has {', '.join(self._names)}"
            )
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(self._names, channels))
        self._out_feature_strides = dict(zip(self._names, strides))
        frozen = [stage for stage, stride in zip(stages, strides) if stride <= 2**freeze_at]
        _freeze(network, frozen, freeze_norm)
        self.network = freeze_norm(network) if norm == "FrozenBN" else network

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """
        Args:
            x: normalised images, shape (N, C, H, W).

        Returns:
            The maps of ``out_features``, each of shape (N, channels, H / stride, W / stride).
        """
        maps = dict(zip(self._names, self.network(x)))
        return {
            name: _channels_first(maps[name], self._out_feature_channels[name])
            for name in self._out_features
        }

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }


def backbone_arguments(cfg: CfgNode, node: CfgNode) -> Dict[str, Any]:
    """The arguments of a :class:`FeatureBackbone` from a config, besides its name.

    Args:
        node: ``MODEL.TIMM`` or ``MODEL.TORCHVISION``.
    """
    # A checkpoint of the whole model (MODEL.WEIGHTS) is loaded over weights of the backbone.
    return {
        "pretrained": node.PRETRAINED and not cfg.MODEL.WEIGHTS,
        "weights": "" if cfg.MODEL.WEIGHTS else node.WEIGHTS,
        "out_features": cfg.MODEL.FPN.IN_FEATURES,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "norm": node.NORM,
    }


def _name(stride: int) -> str:
    return "stem" if stride == 2 else f"res{int(math.log2(stride))}"


def _channels_first(x: torch.Tensor, channels: int) -> torch.Tensor:
    # Transformers such as Swin have the channels last.
    return x if x.shape[1] == channels else x.permute(0, 3, 1, 2)


def _freeze(
    network: nn.Module, stages: Sequence[str], freeze_norm: Callable[[nn.Module], nn.Module]
) -> None:
    """Freeze all modules up to the last of ``stages``, in the order in which they are defined."""
    if not stages:
        return
    names = [name for name, _ in network.named_modules()]
    last = max(i for i, name in enumerate(names) if f"{name}.".startswith(f"{stages[-1]}."))
    for name in names[1 : last + 1]:
        module = network.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False
        parent, _, child = name.rpartition(".")
        # Batch norms have no modules of their own, but for timm's, which hold the activation.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            setattr(network.get_submodule(parent), child, freeze_norm(module))
