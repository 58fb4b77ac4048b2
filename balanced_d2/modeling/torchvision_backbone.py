"""Any classification network of torchvision as a backbone."""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from balanced_d2.modeling.feature_backbone import FeatureBackbone, Pixels, backbone_arguments
from balanced_d2.utils.errors import UserError

# Of the image that is sent through a network to see the strides of its maps.
PROBE = 256


class TorchvisionBackbone(FeatureBackbone):
    """A convolutional classification network of torchvision, such as ``"resnet50"`` or
    ``"mobilenet_v3_large"``, as a backbone.

    Args:
        name: as ``torchvision.models.get_model`` knows it.
        pretrained: whether it has its default ImageNet weights, which torchvision downloads.
        weights: a local file with a state dict of the network instead.
        out_features, freeze_at, norm: as for :class:`FeatureBackbone`.

    Raises:
        UserError: if torchvision has no such network, the network has no feature maps, or its
            weights cannot be loaded.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        pretrained: bool = True,
        weights: str = "",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 2,
        norm: str = "FrozenBN",
    ):
        network = _create(name, pretrained, weights)
        last, strides, channels = _stages(name, network)
        super().__init__(
            _Features(network, last),
            channels,
            strides,
            out_features,
            freeze_at=freeze_at,
            freeze_norm=FrozenBatchNorm2d.convert_frozen_batchnorm,
            norm=norm,
        )


class _Features(nn.Module):
    def __init__(self, network: nn.Module, names: Sequence[str]):
        super().__init__()
        self.extractor = create_feature_extractor(network, {name: name for name in names})

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        return list(self.extractor(x).values())


def torchvision_pixels(name: str) -> Pixels:
    """How the default weights of a network of torchvision expect an image."""
    _check_name(name)
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    mean, std = ([255 * value for value in values] for values in (transforms.mean, transforms.std))
    return Pixels(mean, std, "RGB")


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The network that ``MODEL.TORCHVISION.NAME`` names, for ``MODEL.BALANCED_FPN.BOTTOM_UP``."""
    return TorchvisionBackbone(
        cfg.MODEL.TORCHVISION.NAME, **backbone_arguments(cfg, cfg.MODEL.TORCHVISION)
    )


def _check_name(name: str) -> None:
    names = models.list_models(module=models)
    if name not in names:
        raise UserError(
            f"MODEL.TORCHVISION.NAME: torchvision has no network {name!r}; it has "
            f"{', '.join(names)}"
        )


def _create(name: str, pretrained: bool, weights: str) -> nn.Module:
    _check_name(name)
    try:
        if not weights:
            return models.get_model(name, weights="DEFAULT" if pretrained else None)
        network = models.get_model(name, weights=None)
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # of the download or the file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"MODEL.TORCHVISION: cannot load the weights of {name} from "
            f"{weights or 'where torchvision finds them'}: {reason}"
        ) from error
    return network


def _stages(name: str, network: nn.Module) -> Tuple[List[str], List[int], List[int]]:
    """The last module of each stride from 2 to 32, its stride and the channels of its map.

    Modules are the children of the network and their children: blocks, not what is in them.
    """
    found: Dict[int, Tuple[str, int]] = {}

    def note(module_name: str):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[-1] > 1:
                found[PROBE // output.shape[-1]] = module_name, output.shape[1]

        return hook

    blocks = [(n, m) for n, m in network.named_modules() if n and n.count(".") <= 1]
    handles = [module.register_forward_hook(note(name)) for name, module in blocks]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, PROBE, PROBE))
    except (AssertionError, RuntimeError):  # a transformer that takes images of one size only
        found.clear()
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    strides: List[int] = [stride for stride in (2, 4, 8, 16, 32) if stride in found]
    if strides[-4:] != [4, 8, 16, 32]:
        raise UserError(
            f"MODEL.TORCHVISION.NAME: {name} gives no feature maps of strides 4 to 32, which a "
            "pyramid is built on"
        )
    return (
        [found[stride][0] for stride in strides],
        strides,
        [found[stride][1] for stride in strides],
    )
