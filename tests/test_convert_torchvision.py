"""tools/convert_torchvision_weights.py against torchvision's own detectors with random weights."""

import re
import sys
from typing import NamedTuple

import pytest
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes
from torch import nn
from torchvision.models import detection, get_weight
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from balanced_d2 import load_config
from balanced_d2.checkpoint import conversion, load_weights, torchvision
from balanced_d2.modeling import TorchvisionAnchorGenerator
from balanced_d2.utils.errors import UserError, report_user_errors

from .conftest import load_tool, run_program

CONFIGS = "configs/Torchvision"
# The short side is that of all images, so that torchvision resizes none of them. Padded together to
# 160 x 224; the strides of P6 are then 53 and 56, not 64.
SIZES = ((150, 213), (155, 150))
PIXEL_MEAN, PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
FEW = {"rpn_post_nms_top_n_test": 100, "box_detections_per_img": 40}  # it takes less time
FEW_KEYS = ["MODEL.RPN.POST_NMS_TOPK_TEST", "100", "TEST.DETECTIONS_PER_IMAGE", "40"]


class Kind(NamedTuple):
    build: object
    config: str
    arguments: dict
    options: list
    scales: dict  # mean and standard deviation of the outputs of layers


RCNN_SCALES = {
    "rpn.head.cls_logits": (0, 2),
    "rpn.head.bbox_pred": (0, 0.3),
    "roi_heads.box_predictor.cls_score": (0, 2),
    "roi_heads.box_predictor.bbox_pred": (0, 1),
}
KINDS = {
    "Faster R-CNN": Kind(
        detection.fasterrcnn_resnet50_fpn,
        "faster_rcnn_R_50_FPN.yaml",
        FEW,
        FEW_KEYS,
        RCNN_SCALES,
    ),
    "Faster R-CNN v2": Kind(
        detection.fasterrcnn_resnet50_fpn_v2,
        "faster_rcnn_R_50_FPN_v2.yaml",
        FEW,
        FEW_KEYS,
        RCNN_SCALES,
    ),
    "Mask R-CNN": Kind(
        detection.maskrcnn_resnet50_fpn,
        "mask_rcnn_R_50_FPN.yaml",
        FEW,
        FEW_KEYS,
        {**RCNN_SCALES, "roi_heads.mask_predictor.mask_fcn_logits": (0, 2)},
    ),
    "RetinaNet": Kind(
        detection.retinanet_resnet50_fpn,
        "retinanet_R_50_FPN.yaml",
        {},
        [],
        {"head.classification_head.cls_logits": (-4, 1), "head.regression_head.bbox_reg": (0, 0.3)},
    ),
}


def build(name, num_outputs=91, frozen=False):
    """A detector of torchvision with random weights, whose scores differ.

    Args:
        frozen: whether its batch norm is that of the published files of version 1.
    """
    kind = KINDS[name]
    model = kind.build(
        weights=None, weights_backbone=None, num_classes=num_outputs, **kind.arguments
    )
    # The same images for both, and no rounding in between.
    transform = model.transform
    transform.image_mean, transform.image_std = PIXEL_MEAN, PIXEL_STD
    transform.min_size, transform.max_size = (150,), 1000
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            if frozen:
                module = FrozenBatchNorm2d(module.num_features, eps=0.0)
                model.set_submodule(path, module)
            module.running_mean.normal_(std=0.1)
            # Small variances come with small weights, and the epsilon matters for them.
            module.running_var.copy_(10 ** (torch.rand_like(module.running_var) * 5 - 5))
            factors = torch.rand_like(module.running_var) * 0.8 + 0.4
            module.weight.data.copy_(factors * module.running_var.sqrt())
            module.bias.data.normal_(std=0.2)
        elif getattr(module, "bias", None) is not None:
            module.bias.data.normal_(std=0.1)
    model.eval()
    spread_outputs(model, kind.scales)
    return model


def spread_outputs(model, scales):
    """Let each output of these layers have about this mean and standard deviation."""

    def spread(path, mean, std):
        def hook(module, inputs, output):
            handle.remove()  # of several levels, the first is looked at
            values = output.transpose(0, 1).flatten(1)
            shape = -1, *[1] * (output.dim() - 2)
            factor = std / values.std(dim=1)
            shift = mean + torch.randn_like(factor) * std / 4 - values.mean(dim=1) * factor
            module.weight.data *= factor.view(-1, *[1] * (module.weight.dim() - 1))
            module.bias.data = module.bias.data * factor + shift
            return output * factor.view(shape) + shift.view(shape)

        handle = model.get_submodule(path).register_forward_hook(hook)

    for path, (mean, std) in scales.items():
        spread(path, mean, std)
    with torch.no_grad():
        model(images())


def images():
    """Coarse patches and fine noise, so that all levels differ from place to place; 0 to 255."""
    generator = torch.Generator().manual_seed(5)
    return [
        sum(
            nn.functional.interpolate(torch.rand(1, 3, *grid, generator=generator), size)[0] * 80
            for grid in ((3, 4), (12, 16), size)
        )
        for size in SIZES
    ]


def silence(model, labels):
    """Make sure that a model predicts none of these labels."""
    if isinstance(model, detection.RetinaNet):
        model.head.classification_head.cls_logits.bias.data.view(9, -1)[:, labels] = -60
    else:
        model.roi_heads.box_predictor.cls_score.bias.data[labels] = -60


def theirs(model):
    """Detections of each image, with masks before they are pasted.

    Boxes without area are dropped, as Detectron2 does; torchvision's RetinaNet keeps them.
    """
    model.transform.postprocess = lambda result, sizes, original_sizes: result
    with torch.no_grad():
        results = model(images())
    areas = [(x["boxes"][:, 2:] - x["boxes"][:, :2]).prod(dim=1) for x in results]
    return [{k: v[area > 0] for k, v in x.items()} for x, area in zip(results, areas)]


def converted(state, name, epsilon=None):
    tensors = conversion.state_dict_of(state, "model")
    recognised = torchvision.recognise(tensors, epsilon)
    assert recognised.detector == name and recognised.config == KINDS[name].config
    cfg = load_config(f"{CONFIGS}/{recognised.config}", recognised.options)
    return torchvision.convert(tensors, recognised, cfg)


def ours(name, weights, options=()):
    kind = KINDS[name]
    cfg = load_config(f"{CONFIGS}/{kind.config}", ["MODEL.DEVICE", "cpu", *kind.options, *options])
    model = build_model(cfg).eval()
    load_weights(model, str(weights))  # refuses what is missing, left over or of another shape
    batch = [{"image": image} for image in images()]
    with torch.no_grad():
        if isinstance(model, GeneralizedRCNN):
            return model.inference(batch, do_postprocess=False)  # which would paste the masks
        return [result["instances"] for result in model(batch)]


def assert_equal(expected, results, class_of_label, number=40):
    """The first detections of each image, by their scores, are the same."""
    for theirs, ours in zip(expected, results, strict=True):
        assert min(len(ours), len(theirs["scores"])) >= number
        theirs, ours = {key: value[:number] for key, value in theirs.items()}, ours[:number]
        classes = [class_of_label[label] for label in theirs["labels"].tolist()]
        assert ours.pred_classes.tolist() == classes and len(set(classes)) > 2
        torch.testing.assert_close(ours.scores, theirs["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs["boxes"], atol=0.01, rtol=0)
        assert theirs["scores"].std() > 0.01 and theirs["boxes"].std() > 10
        if "masks" in theirs:
            torch.testing.assert_close(ours.pred_masks, theirs["masks"], atol=1e-3, rtol=0)
            assert theirs["masks"].std() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_detections_are_torchvisions(name, tmp_path):
    """Of COCO's classes, if the ids that COCO does not use are not predicted."""
    model = build(name, frozen=not name.endswith("v2"))
    ids = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]
    # The label 0 is a background in R-CNN, in RetinaNet an output that is not used either.
    silence(model, sorted(set(range(0 if name == "RetinaNet" else 1, 91)) - set(ids)))
    torch.save({"model": converted(model.state_dict(), name)}, tmp_path / "out.pth")
    assert_equal(theirs(model), ours(name, tmp_path / "out.pth"), {n: i for i, n in enumerate(ids)})


@pytest.mark.slow
@pytest.mark.parametrize("name, node", [("Faster R-CNN", "ROI_HEADS"), ("RetinaNet", "RETINANET")])
def test_program(name, node, tmp_path):
    """On a model of three classes, trained without frozen batch norm."""
    model = build(name, num_outputs=4)
    if name == "RetinaNet":  # whose label 0 is one of its outputs, but no class
        silence(model, [0])
    source, output = tmp_path / "source.pth", tmp_path / "made" / "out.pth"
    torch.save({"model": model.state_dict(), "epoch": 3}, source)
    result = run_program("tools/convert_torchvision_weights.py", source, output)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    options = [f"MODEL.{node}.NUM_CLASSES", "3"]
    first, second, third = result.stdout.splitlines()
    assert first == f"recognised: torchvision {name}, R-50, 3 classes"
    assert second.startswith(f"written: {output} (")
    assert third == (
        f"use it with: --config-file {CONFIGS}/{KINDS[name].config} MODEL.WEIGHTS {output} "
        f"{' '.join(options)}"
    )
    assert_equal(theirs(model), ours(name, output, options), {1: 0, 2: 1, 3: 2})


def shapes(model_builder, **arguments):
    """The tensors of a detector of torchvision without values."""
    with torch.device("meta"):
        return model_builder(weights=None, weights_backbone=None, **arguments).state_dict()


def old_names(state):
    """As older versions of torchvision, and the published files of version 1, have them."""
    for pattern, old in (
        (r"(inner_blocks|layer_blocks)\.(\d)\.0\.", lambda m: f"{m[1]}.{m[2]}."),
        (r"rpn\.head\.conv\.0\.0\.", lambda m: "rpn.head.conv."),
        (r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}."),
        (r"(cation|sion)_head\.conv\.(\d)\.0\.", lambda m: f"{m[1]}_head.conv.{2 * int(m[2])}."),
    ):
        state = {re.sub(pattern, old, name): tensor for name, tensor in state.items()}
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", ["Faster R-CNN", "Mask R-CNN", "RetinaNet"])
def test_published_files_have_older_names(name):
    state = shapes(KINDS[name].build)
    numbered = {
        k: torch.full((), float(i)).expand(v.shape) for i, (k, v) in enumerate(state.items())
    }
    old = old_names(numbered)
    assert len(old.keys() - state.keys()) > 10
    with torch.device("meta"):
        model = KINDS[name].build(weights=None, weights_backbone=None)
    missing = model.load_state_dict(dict(old), strict=False, assign=True)
    assert all(key.endswith("num_batches_tracked") for key in sum(missing, []))
    a, b = (converted(tensors, name, epsilon=1e-5) for tensors in (old, numbered))
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_classes_of_coco():
    used = set(range(1, 91)) - set(torchvision.UNUSED_IDS)
    assert used == {category["id"] for category in COCO_CATEGORIES if category["isthing"]}
    for kind in torchvision.WEIGHTS:
        names = get_weight(f"{kind}.COCO_V1").meta["categories"]
        assert len(names) == torchvision.COCO_OUTPUTS
        assert {i for i, name in enumerate(names) if name not in ("__background__", "N/A")} == used


def test_pixels_are_torchvisions():
    with torch.device("meta"):
        transform = KINDS["RetinaNet"].build(weights=None, weights_backbone=None).transform
    for kind in KINDS.values():
        cfg = load_config(f"{CONFIGS}/{kind.config}")
        assert [255 * value for value in transform.image_mean] == pytest.approx(PIXEL_MEAN)
        assert [255 * value for value in transform.image_std] == pytest.approx(PIXEL_STD)
        assert (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == (PIXEL_MEAN, PIXEL_STD)
        assert cfg.INPUT.FORMAT == "RGB"
        sizes = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
        assert sizes == (transform.min_size, transform.max_size)


@pytest.mark.parametrize(
    "name, frozen, asked, epsilon",
    [
        ("Faster R-CNN", True, None, 0.0),  # as published
        ("Faster R-CNN", False, None, 1e-5),
        ("Faster R-CNN", True, 1e-5, 1e-5),
        ("Faster R-CNN v2", False, None, 1e-5),
        ("Faster R-CNN v2", True, None, 1e-5),
        ("RetinaNet", True, None, 0.0),
    ],
)
def test_epsilon(name, frozen, asked, epsilon):
    state = shapes(KINDS[name].build)
    if frozen:
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert torchvision.recognise(state, asked).epsilon == epsilon


@pytest.mark.parametrize(
    "name, module, sizes, levels",
    [
        ("Faster R-CNN", detection.faster_rcnn, 1, range(2, 7)),
        ("RetinaNet", detection.retinanet, 3, range(3, 8)),
    ],
)
def test_anchors_are_torchvisions(name, module, sizes, levels):
    cfg = load_config(f"{CONFIGS}/{KINDS[name].config}")
    ours = TorchvisionAnchorGenerator(
        sizes=cfg.MODEL.ANCHOR_GENERATOR.SIZES,
        aspect_ratios=cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
        strides=[2**level for level in levels],
        offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
    )
    theirs = module._default_anchorgen()
    for height, width in ((800, 1344), (608, 800), (160, 224), (1056, 32)):
        features = [
            torch.zeros(1, 1, -(-height // 2**level), -(-width // 2**level)) for level in levels
        ]
        image = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
        (expected,) = theirs(image, features)
        expected = expected.view(-1, 3, sizes, 4).transpose(1, 2).reshape(-1, 4)
        assert torch.equal(Boxes.cat(ours(features)).tensor, expected)


@pytest.mark.parametrize(
    "builder, change, parts",
    {
        "missing": (
            detection.fasterrcnn_resnet50_fpn,
            lambda state: state.pop("rpn.head.conv.0.0.bias"),
            ["not contain a torchvision Faster R-CNN", "rpn.head.conv.0.0.bias is missing"],
        ),
        "shape": (
            detection.fasterrcnn_resnet50_fpn,
            lambda state: state.update(
                {"roi_heads.box_predictor.bbox_pred.bias": torch.ones(4, device="meta")}
            ),
            ["roi_heads.box_predictor.bbox_pred.bias has shape (4,), not (364,)"],
        ),
        "twice": (
            detection.fasterrcnn_resnet50_fpn,
            lambda state: state.update({"rpn.head.conv.bias": state["rpn.head.conv.0.0.bias"]}),
            ["rpn.head.conv.0.0.bias is left over"],
        ),
        "keypoints": (
            detection.keypointrcnn_resnet50_fpn,
            lambda state: None,
            ["roi_heads.keypoint_head.0.weight is left over"],
        ),
        "no classes": (
            detection.fasterrcnn_resnet50_fpn,
            lambda state: state.update(
                {"roi_heads.box_predictor.cls_score.bias": torch.ones(1, device="meta")}
            ),
            ["a Faster R-CNN without classes"],
        ),
        "MobileNetV3": (
            detection.fasterrcnn_mobilenet_v3_large_fpn,
            lambda state: None,
            ["a Faster R-CNN without torchvision's ResNet-50", "MobileNetV3 cannot be converted"],
        ),
        "no config": (
            detection.retinanet_resnet50_fpn_v2,
            lambda state: None,
            ["no config for a RetinaNet v2, only for: Faster R-CNN, "],
        ),
        "another detector": (
            detection.ssd300_vgg16,
            lambda state: None,
            ["neither an R-CNN nor a RetinaNet", "cls_logits.bias are both missing"],
        ),
    }.values(),
)
def test_mismatches_are_named(builder, change, parts):
    state = shapes(builder)
    change(state)
    with pytest.raises(UserError) as error:
        recognised = torchvision.recognise(state)
        cfg = load_config(f"{CONFIGS}/{recognised.config}", recognised.options)
        torchvision.convert(state, recognised, cfg)
    assert all(part in str(error.value) for part in parts), error.value


def convert(source, output, monkeypatch):
    program = "convert_torchvision_weights"
    monkeypatch.setattr(sys, "argv", [f"{program}.py", str(source), str(output)])
    tool = load_tool(program)
    return report_user_errors(tool.main, tool.parse_args())


def no_network(*args, **kwargs):
    raise OSError("no route to host")


@pytest.mark.parametrize(
    "source, parts",
    {
        "no file": ("none.pth", ["there is no file none.pth"]),
        "text": ("{}/text.pth", ["text.pth is not a PyTorch checkpoint"]),
        "other": ("{}/other.pth", ["other.pth: it contains neither an R-CNN nor a RetinaNet"]),
        "list": ("{}/list.pth", ["list.pth: it contains no state dict"]),
        "output is the input": ("{}/out.pth", ["the output would replace the checkpoint"]),
        "unknown": ("resnet50", ["no file resnet50", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"]),
        "MobileNetV3": (
            "FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1",
            ["none of torchvision's weights", "RetinaNet_ResNet50_FPN_Weights.COCO_V1"],
        ),
        "no network": (
            "RetinaNet_ResNet50_FPN_Weights.COCO_V1",
            ["cannot download https://", "retinanet_resnet50_fpn_coco", "no route to host"],
        ),
    }.values(),
)
def test_wrong_weights(source, parts, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for name, content in (
        ("other", {"model": {"a": torch.ones(1)}}),
        ("list", [torch.ones(1)]),
        ("out", {"a": torch.ones(1)}),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
    before = (tmp_path / "out.pth").read_bytes()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert convert(source.format(tmp_path), tmp_path / "out.pth", monkeypatch) == 2
    said = capsys.readouterr().err.splitlines()[-1:]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert all(part in said[0] for part in parts), said
    assert (tmp_path / "out.pth").read_bytes() == before


def test_weights_that_torchvision_downloads(tmp_path, monkeypatch, capsys):
    """Here they are in its cache already."""
    name = "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"
    cache = tmp_path / "cache" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    state = old_names(shapes(KINDS["Faster R-CNN"].build))
    small = {key: torch.full((), 0.5).expand(value.shape) for key, value in state.items()}
    torch.save(small, cache / get_weight(name).url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert convert(name, tmp_path / "out.pth", monkeypatch) == 0
    assert "recognised: torchvision Faster R-CNN, R-50, 80 classes" in capsys.readouterr().out
    content = torch.load(tmp_path / "out.pth", weights_only=True, mmap=True)
    assert content["__author__"] == "Torchvision"
    norm = "backbone.bottom_up.stem.conv1.norm"
    assert set(content["model"][f"{norm}.weight"].tolist()) == {0.5}
    # Detectron2 adds the epsilon, which these weights were trained without.
    assert set(content["model"][f"{norm}.running_var"].tolist()) == {
        torch.tensor(0.5 - 1e-5).item()
    }
