"""Networks of other libraries as Detectron2's backbones: names, strides, frozen stages, pixels."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from balanced_d2.utils.errors import UserError

# Height and width of the image that a network is tried with: multiples of 32, as a pyramid pads
# images to, and of none of the sizes that transformers are made for.
PROBE = (160, 192)


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
        network: gives a list of maps, (N, C, H, W) or (N, H, W, C), for a batch of images.
        channels, strides: of each of its maps.
        out_features: which of them the backbone gives: "stem" has stride 2, "res2" 4, "res3" 8,
            "res4" 16 and "res5" 32.
        freeze_at: what is frozen, by stride as in ResNets: 0 nothing, 1 what the map of stride 2 is
            computed by, 2 what that of stride 4 is, and so on.
        freeze_norm: freezes the batch norm in a module, and returns it.
        norm: of the stages that are trained: "FrozenBN" (statistics and factors of the weights), or
            "BN".

    Raises:
        UserError: if the network has no such feature, ``norm`` is unknown, it does not take images
            of every size, or its stages cannot be frozen one after the other.
    """

    def __init__(
        self,
        network: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        out_features: Sequence[str],
        *,
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
        with torch.enable_grad():
            maps = _maps_of_a_probe(network, len(strides))
            self._channels_last = _are_channels_last(maps, channels, strides)
            _freeze(network, maps, sum(stride <= 2**freeze_at for stride in strides), freeze_norm)
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
            # Transformers such as Swin have the channels last.
            name: maps[name].permute(0, 3, 1, 2) if self._channels_last else maps[name]
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


def _maps_of_a_probe(network: nn.Module, number: int) -> List[torch.Tensor]:
    was_training = network.training
    try:
        maps = list(network.eval()(torch.zeros(1, 3, *PROBE)))
    except (AssertionError, RuntimeError, ValueError) as error:  # each library has its own
        raise UserError(
            f"the backbone does not take images of every size (tried {PROBE[0]} x {PROBE[1]}: "
            f"{' '.join(str(error).split())[:200]}); choose another network"
        ) from error
    finally:
        network.train(was_training)
    assert len(maps) == number
    return maps


def _are_channels_last(
    maps: Sequence[torch.Tensor], channels: Sequence[int], strides: Sequence[int]
) -> bool:
    shapes = [tuple(x.shape[1:]) for x in maps]
    sizes = [(PROBE[0] // stride, PROBE[1] // stride) for stride in strides]
    if shapes == [(number, *size) for number, size in zip(channels, sizes)]:
        return False
    if shapes == [(*size, number) for number, size in zip(channels, sizes)]:
        return True
    raise UserError(
        f"the backbone's maps of an image of {PROBE[0]} x {PROBE[1]} have the shapes "
        f"{', '.join(map(str, shapes))}, and not its height and width divided by "
        f"{', '.join(map(str, strides))}: no pyramid can be built on them; choose another network"
    )


def _freeze(
    network: nn.Module,
    maps: Sequence[torch.Tensor],
    number: int,
    freeze_norm: Callable[[nn.Module], nn.Module],
) -> None:
    """Freeze what the first ``number`` maps are computed by."""
    frozen = _parameters_of(network, maps[:number])
    if 0 < number < len(maps) and not frozen <= _parameters_of(network, [maps[number]]):
        raise UserError(
            "the backbone's maps are not computed one after the other, so that its stages cannot "
            "be frozen: set MODEL.BACKBONE.FREEZE_AT to 0"
        )
    for name, module in list(network.named_modules()):
        own = list(module.parameters(recurse=False))
        for parameter in own:
            if parameter in frozen:
                parameter.requires_grad = False
        # Batch norms have no modules of their own, but for timm's, which hold the activation.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and frozen.issuperset(own):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, freeze_norm(module))


def _parameters_of(network: nn.Module, maps: Sequence[torch.Tensor]) -> Set[nn.Parameter]:
    """Those that maps are computed by, and that can be trained."""
    if not any(x.requires_grad for x in maps):  # as in inference mode
        return set()
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = torch.stack([x.sum() for x in maps]).sum()
    gradients: Sequence[Optional[torch.Tensor]] = torch.autograd.grad(
        total, parameters, retain_graph=True, allow_unused=True
    )
    return {p for p, gradient in zip(parameters, gradients) if gradient is not None}
