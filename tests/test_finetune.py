"""Training that starts from another detector's checkpoint: what fits, and classes by name."""

import json
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from balanced_d2 import load_config
from balanced_d2.checkpoint import BalancedCheckpointer, load_weights, start_from
from balanced_d2.checkpoint.finetune import adapt_classes, match_names, num_classes, report
from balanced_d2.data import register_coco
from balanced_d2.data.classes import training_classes
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, assert_user_error, write_coco

# Two of COCO's classes, by their places in it, and one that it does not have.
NAMES = ["traffic_light", "zebra fish", "Person"]
SOURCES = {0: 9, 2: 0}

TINY = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8, 8)"),
]
# name: config, options that make it plain, and the modules whose rows belong to classes, with how
# many anchors they have and how many rows of each class
ARCHITECTURES = {
    "Faster R-CNN": (
        "COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
        {"roi_heads.box_predictor.cls_score": (1, 1), "roi_heads.box_predictor.bbox_pred": (1, 4)},
    ),
    "Mask R-CNN": (
        "COCO-InstanceSegmentation/balanced_mask_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
        {
            "roi_heads.box_predictor.cls_score": (1, 1),
            "roi_heads.box_predictor.bbox_pred": (1, 4),
            "roi_heads.mask_head.predictor": (1, 1),
        },
    ),
    "Keypoint R-CNN": (
        "COCO-Keypoints/balanced_keypoint_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
        {"roi_heads.box_predictor.cls_score": (1, 1), "roi_heads.box_predictor.bbox_pred": (1, 4)},
    ),
    "Cascade R-CNN": (  # whose boxes are the same for all classes
        "Misc/balanced_cascade_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
        {f"roi_heads.box_predictor.{k}.cls_score": (1, 1) for k in range(3)},
    ),
    "RetinaNet": (
        "COCO-Detection/balanced_retinanet_R_50_FPN_1x.yaml",
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
        {"head.cls_score": (9, 1)},
    ),
}


def config(name, num_classes, plain=False):
    file, as_detectron2, _ = ARCHITECTURES[name]
    options = [*TINY, "MODEL.DEVICE", "cpu"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes)]
    options += ["MODEL.RETINANET.NUM_CLASSES", str(num_classes)]
    if plain:
        backbone = f"build_{'retinanet_' if name == 'RetinaNet' else ''}resnet_fpn_backbone"
        options += [*as_detectron2, "MODEL.BACKBONE.NAME", backbone]
        options += ["MODEL.BALANCED_FPN.ENABLED", "False"]
        options += ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random"]
        options += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]
        options += ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1"]
    return load_config(str(ROOT / "configs" / file), options)


def trained(name, num_classes=80):
    """The state of a plain model of Detectron2 with other values than any that is initialised."""
    state = build_model(config(name, num_classes, plain=True)).state_dict()
    for value in state.values():
        value.copy_(torch.randn_like(value))
    return state


def write(state, file, **others):
    """As Detectron2 saves it (.pth), or as its zoo has it (.pkl)."""
    if file.suffix == ".pkl":
        arrays = {key: value.numpy() for key, value in state.items()}
        arrays["pixel_mean"] = np.zeros((3, 1, 1), np.float32)  # no longer a weight
        arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
        content = {"model": arrays, "__author__": "Detectron2 Model Zoo", **others}
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save({"model": state, "iteration": 269999, "scheduler": {}, **others}, file)
    return str(file)


def initialised(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(got, expected):
    assert list(got) == list(expected)
    for key, value in got.items():
        assert torch.equal(value, expected[key]), key


def expected_rows(name, theirs, before, sources, num_theirs=80, num_ours=3):
    """By plain loops: row by row."""
    expected = {key: theirs.get(key, value).clone() for key, value in before.items()}
    for module, (anchors, size) in ARCHITECTURES[name][2].items():
        for key in (f"{module}.weight", f"{module}.bias"):
            expected[key] = before[key].clone()
            pairs = dict(sources)
            step_theirs, step_ours = num_theirs, num_ours
            if "box_predictor" in module and "cls_score" in module:
                pairs[num_ours] = num_theirs
                step_theirs, step_ours = num_theirs + 1, num_ours + 1
            for anchor in range(anchors):
                for ours, other in pairs.items():
                    for row in range(size):
                        to = (anchor * step_ours + ours) * size + row
                        source = (anchor * step_theirs + other) * size + row
                        expected[key][to] = theirs[key][source]
    return expected


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def warnings(log):
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def labelled_image(name):
    """Of 64 x 96 pixels, with a box, and with a mask or keypoints where they are learnt."""
    instances = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[8.0, 6, 60, 50]])))
    instances.gt_classes = torch.tensor([1])
    if name == "Mask R-CNN":
        instances.gt_masks = PolygonMasks([[np.array([8.0, 6, 60, 6, 60, 50, 8, 50])]])
    if name == "Keypoint R-CNN":
        instances.gt_keypoints = Keypoints(np.tile([30.0, 20, 2], (1, 17, 1)))
    return {"image": 255 * torch.rand(3, 64, 96), "instances": instances, "height": 64, "width": 96}


# Names


def test_names_are_matched_exactly_or_else_alike():
    theirs = ["cat", "Cat", "traffic light", "stop-sign", "dog"]
    ours = ["Cat", "cat", "CAT", "Traffic_Light", "stopsign", "dogs", "fish"]
    assert match_names(theirs, ours) == [1, 0, 0, 2, 3, None, None]


def test_the_number_of_classes():
    rcnn = {"roi_heads.box_predictor.0.cls_score.weight": torch.zeros(4, 2)}
    anchors = {"head.bbox_pred.weight": torch.zeros(36, 2, 3, 3)}
    retinanet = {"head.cls_score.weight": torch.zeros(63, 2, 3, 3), **anchors}
    assert [num_classes(state) for state in (rcnn, retinanet, anchors, {})] == [3, 7, None, None]


def box_predictor(num_classes, start, features=2):
    rows = (num_classes + 1, 4 * num_classes)
    state = {}
    for module, number in zip(("cls_score", "bbox_pred"), rows):
        bias = start + torch.arange(float(number))
        prefix = f"roi_heads.box_predictor.{module}"
        state[f"{prefix}.weight"] = bias[:, None].repeat(1, features) / 2
        state[f"{prefix}.bias"] = bias
    return state


def test_rows_of_a_box_predictor():
    theirs, ours = box_predictor(2, start=100), box_predictor(3, start=0)
    adapted = adapt_classes(theirs, ours, ["a", "b"], ["b", "c", "A"])
    assert adapted.classes == ["b", "A"] and not adapted.dropped and not adapted.message
    prefix = "roi_heads.box_predictor"
    bias = {
        module: adapted.tensors[f"{prefix}.{module}.bias"].tolist()
        for module in ("cls_score", "bbox_pred")
    }
    assert bias["cls_score"] == [101, 1, 100, 102]  # the last is the background
    assert bias["bbox_pred"] == [104, 105, 106, 107, 4, 5, 6, 7, 100, 101, 102, 103]
    for module in bias:
        weight = adapted.tensors[f"{prefix}.{module}.weight"]
        assert (weight * 2).T.tolist() == [bias[module]] * 2
    assert ours["roi_heads.box_predictor.cls_score.bias"].tolist() == [0, 1, 2, 3]  # not changed


def test_no_name_in_common():
    """The background is background for every detector."""
    theirs, ours = box_predictor(2, start=100), box_predictor(2, start=0)
    adapted = adapt_classes(theirs, ours, ["a", "b"], ["c", "d"])
    bias = adapted.tensors["roi_heads.box_predictor.cls_score.bias"]
    assert bias.tolist() == [0, 1, 102] and len(adapted.tensors) == 2
    assert sorted(adapted.dropped) == [
        f"roi_heads.box_predictor.bbox_pred.{kind}" for kind in ("bias", "weight")
    ]


def test_a_head_of_another_width_begins_again_as_a_whole():
    theirs, ours = box_predictor(2, start=100, features=3), box_predictor(3, start=0)
    adapted = adapt_classes(theirs, ours, ["a", "b"], ["b", "c", "a"])
    assert not adapted.tensors and sorted(adapted.dropped) == sorted(theirs)


@pytest.mark.parametrize("anchors", [(2, 3), (3, 3)])
def test_retinanets_of_other_anchors_share_no_rows(anchors):
    """Also where 2 x 6 and 3 x 4 rows have the same shape."""
    states = []
    for number, classes in zip(anchors, (6, 4)):
        states.append(
            {
                "head.cls_score.weight": torch.rand(number * classes, 2, 3, 3),
                "head.bbox_pred.weight": torch.rand(number * 4, 2, 3, 3),
            }
        )
    adapted = adapt_classes(*states, list("abcdef"), list("abcd"))
    if anchors == (2, 3):
        assert adapted.dropped == ["head.cls_score.weight"] and not adapted.tensors
    else:
        (weight,) = adapted.tensors.values()
        theirs = states[0]["head.cls_score.weight"].view(3, 6, 2, 3, 3)
        assert torch.equal(weight.view(3, 4, 2, 3, 3), theirs[:, :4])


@pytest.mark.parametrize("their_names", [None, ["a"]])
def test_without_names(their_names):
    """Names of another number of classes are no names, either."""
    states = [box_predictor(number, start=0) for number in (2, 2, 3)]
    same = adapt_classes(*states[:2], their_names, ["x", "y"])
    assert not same.tensors and not same.dropped and "taken in their order" in same.message
    other = adapt_classes(*states[1:], their_names, ["x", "y", "z"])
    assert not other.tensors and len(other.dropped) == 4 and "begins again" in other.message
    ours = adapt_classes(*states[:2], ["a", "b"], None)
    assert "of the training data are not known" in ours.message


def test_a_table_of_many_classes():
    theirs, ours = box_predictor(7, start=100), box_predictor(9, start=0)
    adapted = adapt_classes(theirs, ours, list("abcdefg"), list("ihgfedcba"))
    table = report(ours, [], adapted, ["x.weight", "x.bias", "y"])
    assert "| 4 (7 of 9 classes: g, f, e, d, c, … and 2 more) |" in table
    assert table.endswith("left over in the checkpoint: x (2), y (1)")


# Whole models


@pytest.mark.parametrize("file", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_coco_model_starts_one_of_three_classes(name, file, tmp_path, log):
    theirs = trained(name)
    path = write(theirs, tmp_path / file)
    model = build_model(config(name, 3))
    before = initialised(model)
    balancer = {key for key in before if ".balancer." in key}
    assert set(before) - set(theirs) == balancer and balancer
    start_from(model, path, NAMES)
    assert_equal(model.state_dict(), expected_rows(name, theirs, before, SOURCES))

    (table,) = [text for text in log.messages if "what the model starts with" in text]
    rows = {}
    for line in table.splitlines():
        if line.startswith("|"):
            part, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows[part] = cells
    count = {part: sum(key.startswith(part) for key in before) for part in ("backbone.bottom_up.",)}
    assert rows["backbone"] == [str(count["backbone.bottom_up."]), "", ""]
    assert rows["balancer"] == ["", "", str(len(balancer))]
    number = 2 * len(ARCHITECTURES[name][2])
    adapted = [cells[1] for cells in rows.values() if "classes: " in cells[1]]
    assert all("(2 of 3 classes: traffic_light, Person)" in cell for cell in adapted)
    assert sum(int(cell.split()[0]) for cell in adapted) == number
    assert "left over in the checkpoint: nothing" in table
    assert not warnings(log) and len(log.records) < 12


@pytest.mark.parametrize("zero_init", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_with_zero_init_it_starts_as_the_plain_detector(name, zero_init, tmp_path):
    """Detections, losses and the gradients of all that both have; and not without it."""
    torch.manual_seed(0)
    plain = build_model(config(name, 3, plain=True))
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if "fpn_lateral" in key:  # what a ResNet of random weights gives is in the thousands
                parameter.mul_(1e-3)
            elif key.endswith(("cls_score.weight", "bbox_pred.weight", "objectness_logits.weight")):
                parameter.normal_(std=0.5)
            elif key == "head.cls_score.bias":
                parameter.fill_(-1)
    path = write(plain.state_dict(), tmp_path / "plain.pth")
    options = ["MODEL.BALANCED_FPN.ZERO_INIT", str(zero_init)]
    options += ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random"]
    options += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]
    options += ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1"]
    cfg = config(name, 3)
    cfg.merge_from_list(options)
    balanced = build_model(cfg)
    with torch.no_grad():
        for key, parameter in balanced.named_parameters():
            if "balancer" in key and not key.endswith("scale"):
                parameter.normal_(std=0.1)
    start_from(balanced, path, [])
    results = []
    for model in (plain, balanced):
        torch.manual_seed(1)
        image = labelled_image(name)
        with EventStorage():
            losses = model.train()([image])
        sum(losses.values()).backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            found = model.eval()([image])[0]["instances"]
        boxes, scores = found.pred_boxes.tensor / 64, found.scores
        results.append(({**losses, "boxes": boxes, "scores": scores}, gradients))
    (expected, expected_gradients), (got, gradients) = results
    differs = [
        key
        for key, value in expected.items()
        if value.shape != got[key].shape or not torch.allclose(got[key], value, atol=1e-6, rtol=0)
    ]
    if not zero_init:
        assert {"boxes", "scores"} <= set(differs)
        return
    assert not differs and len(expected["boxes"]) > 0
    for key, value in expected_gradients.items():
        assert torch.allclose(gradients[key], value, rtol=1e-4, atol=1e-5), key
    learnt = {key for key in gradients if "balancer" in key}
    assert any(gradients[key].abs().max() > 0 for key in learnt)


@pytest.mark.parametrize("file", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_classes_are_loaded_as_by_detectron2(name, file, tmp_path, log):
    names, theirs = ["a", "b", "c"], trained(name, 3)
    norm = theirs._metadata["backbone.bottom_up.stem.conv1.norm"]
    norm["version"] = 2  # whose variance is another
    path = write(theirs, tmp_path / file, class_names=names)
    states = []
    for load in (
        lambda model: DetectionCheckpointer(model).load(path),
        lambda model: start_from(model, path, names),
        lambda model: start_from(model, path, ["A ", "b", "C"]),
        lambda model: start_from(model, path),
    ):
        torch.manual_seed(3)
        model = build_model(config(name, 3))
        load(model)
        states.append(model.state_dict())
    for state in states[1:]:
        assert_equal(state, states[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_classes_in_another_order(name, tmp_path):
    theirs = trained(name, 3)
    path = write(theirs, tmp_path / "model.pth", class_names=["a", "b", "c"])
    model = build_model(config(name, 3))
    before = initialised(model)
    start_from(model, path, ["c", "a", "b"])
    expected = expected_rows(name, theirs, before, {0: 2, 1: 0, 2: 1}, num_theirs=3)
    assert_equal(model.state_dict(), expected)


def test_80_classes_without_names(tmp_path, log):
    """Those of the zoo are COCO's, those of other files may be the user's own."""
    theirs = trained("Faster R-CNN")
    names = [f"class {index}" for index in range(79)] + ["person"]
    bias = "roi_heads.box_predictor.cls_score.bias"
    for file in ("zoo.pkl", "own.pth"):
        model = build_model(config("Faster R-CNN", 80))
        before = initialised(model)[bias]
        start_from(model, write(theirs, tmp_path / file), names)
        got, trained_bias = model.state_dict()[bias], theirs[bias]
        if file == "own.pth":
            assert torch.equal(got, trained_bias)
            assert "80 of the checkpoint are taken in their order" in warnings(log)[-1]
        else:
            assert got[79] == trained_bias[0] and got[80] == trained_bias[80]
            assert torch.equal(got[:79], before[:79]) and not warnings(log)


def test_without_names_another_number_of_classes_begins_again(tmp_path, log):
    theirs = trained("Mask R-CNN", 5)
    model = build_model(config("Mask R-CNN", 3))
    before = initialised(model)
    start_from(model, write(theirs, tmp_path / "model.pth"), NAMES)
    expected = {
        key: before[key] if "predictor" in key else theirs.get(key, before[key]) for key in before
    }
    assert_equal(model.state_dict(), expected)
    (warning,) = warnings(log)
    assert "not known: what predicts the 5 of the checkpoint begins again" in warning
    assert "predictor of classes and boxes (4), mask head (2)" in log.text  # left over


def test_one_box_for_all_classes(tmp_path):
    options = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    configs = [config("Faster R-CNN", number) for number in (80, 3)]
    for cfg in configs:
        cfg.merge_from_list(options)
    theirs = {k: torch.randn_like(v) for k, v in build_model(configs[0]).state_dict().items()}
    model = build_model(configs[1])
    start_from(model, write(theirs, tmp_path / "model.pth"), NAMES)
    for kind in ("weight", "bias"):
        key = f"roi_heads.box_predictor.bbox_pred.{kind}"
        assert torch.equal(model.state_dict()[key], theirs[key])


def test_a_pyramid_of_another_width_and_what_is_left_over(tmp_path, log):
    theirs = trained("Mask R-CNN")
    cfg = config("Faster R-CNN", 3)
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    model = build_model(cfg)
    before = initialised(model)
    start_from(model, write(theirs, tmp_path / "model.pth"), NAMES)
    for key, value in model.state_dict().items():
        fits = key in theirs and theirs[key].shape == value.shape
        if "box_predictor" not in key:
            assert torch.equal(value, theirs[key] if fits else before[key]), key
    number = sum(key.startswith("backbone.fpn_") for key in theirs)
    assert re.search(rf"\| pyramid +\| +\| +\| {number} +\|", log.text)
    masks = sum("mask_head" in key for key in theirs)
    assert f"left over in the checkpoint: mask head ({masks}), pyramid ({number})" in log.text


def test_wrapped_models(tmp_path):
    """Of several processes, whether it is the checkpoint's or the model to be trained."""
    theirs = trained("Faster R-CNN")
    wrapped = {f"module.{key}": value for key, value in theirs.items()}
    path = write(wrapped, tmp_path / "model.pth")
    model = build_model(config("Faster R-CNN", 3))
    before = initialised(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        start_from(nn.parallel.DistributedDataParallel(model), path, NAMES)
    finally:
        torch.distributed.destroy_process_group()
    expected = expected_rows("Faster R-CNN", theirs, before, SOURCES)
    assert_equal(model.state_dict(), expected)


def imagenet_file(model, folder):
    """A pickle by Caffe2's names: of frozen batch norm the weight and the bias are enough."""
    branches = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    branches["shortcut"] = "branch1"
    kinds = {"weight": "w", "norm.weight": "bn_s", "norm.bias": "bn_b"}
    arrays = {"fc1000_w": np.zeros((1000, 8), np.float32)}
    for key, value in model.state_dict().items():
        found = re.fullmatch(r"backbone\.bottom_up\.(\w+)\.(\w+)(\.(conv\d|shortcut))?\.(.*)", key)
        if not found or found[5] not in kinds:
            continue
        place = f"{found[1]}_{found[2]}_{branches.get(found[4])}"
        if found[1] == "stem":
            place = "conv1" if found[5] == "weight" else "res_conv1"
        array = np.random.default_rng(len(arrays)).random(value.shape, np.float32)
        arrays[f"{place}_{kinds[found[5]]}"] = array
    file = folder / "R-50.pkl"
    file.write_bytes(pickle.dumps(arrays))
    return str(file), arrays


def test_an_imagenet_backbone(tmp_path, log):
    states = []
    for load in (start_from, lambda model, path: DetectionCheckpointer(model).load(path)):
        torch.manual_seed(1)
        model = build_model(config("Faster R-CNN", 3))
        path, arrays = imagenet_file(model, tmp_path)
        load(model, path)
        states.append(model.state_dict())
        if len(states) == 1:
            assert not warnings(log) and "Following weights matched" not in log.text
            number = sum(key.startswith("backbone.bottom_up.") for key in states[0])
            assert re.search(rf"\| backbone +\| {number} +\| +\| +\|", log.text)
            assert "left over in the checkpoint: fc1000 (1)" in log.text
    assert_equal(*states)
    weight = states[0]["backbone.bottom_up.res3.1.conv2.weight"]
    assert torch.equal(weight, torch.from_numpy(arrays["res3_1_branch2b_w"]))


def test_part_of_another_backbone(tmp_path, log):
    """Statistics of batch norm that has no weights count as missing, too."""
    theirs = {key: v for key, v in trained("Faster R-CNN").items() if ".res5." not in key}
    model = build_model(config("Faster R-CNN", 3))
    number, missing = (
        sum(prefix in key for key in model.state_dict()) for prefix in ("bottom_up.", ".res5.")
    )
    start_from(model, write(theirs, tmp_path / "model.pth"), NAMES)
    (warning,) = warnings(log)
    assert f"{missing} of the {number} tensors of the backbone are not in it" in warning


def test_a_predictor_of_another_detector(tmp_path, log):
    """Of which no module has a counterpart."""
    theirs = trained("Faster R-CNN", 3)
    model = build_model(config("Cascade R-CNN", 3))
    before = initialised(model)
    start_from(model, write(theirs, tmp_path / "model.pth"), NAMES)
    for key, value in model.state_dict().items():
        assert torch.equal(value, theirs.get(key, before[key])), key
    heads = "box head (4), predictor of classes and boxes (4)"
    assert f"left over in the checkpoint: {heads}" in log.text and not warnings(log)


# What is refused


@pytest.mark.parametrize(
    "names, message",
    [
        (["conv1.weight", "layer1.0.conv1.weight"], "nothing fits.*a ResNet by the names of torch"),
        (
            ["backbone.conv1.weight", "neck.0.lateral_convs.0.conv.weight"],
            "MMDetection.*balanced-d2 convert-mmdet",
        ),
        (["backbone.body.conv1.weight"], "a detector of torchvision"),
        (["some.weight", "other.weight", "third"], "3 tensors, such as some.weight, other.weight"),
        ([], "no tensors"),
    ],
)
def test_of_which_nothing_fits(names, message, tmp_path):
    path = write({name: torch.zeros(2, 2) for name in names}, tmp_path / "weights.pth")
    model = build_model(config("Faster R-CNN", 3))
    before = initialised(model)
    pattern = f"MODEL.WEIGHTS: .*weights.pth does not fit the model: .*{message}"
    with pytest.raises(UserError, match=pattern):
        start_from(model, path, NAMES)
    assert_equal(model.state_dict(), before)


def test_of_which_nothing_of_the_backbone_fits(tmp_path):
    theirs = {k: v for k, v in trained("Faster R-CNN").items() if not k.startswith("backbone.")}
    theirs["backbone.bottom_up.patch_embed.weight"] = torch.zeros(1)
    path = write(theirs, tmp_path / "weights.pkl")
    model = build_model(config("Faster R-CNN", 3))
    with pytest.raises(UserError, match="only box head, predictor of classes.*another Detectron2"):
        start_from(model, path, NAMES)


def test_evaluation_stays_strict(tmp_path):
    path = write(trained("Faster R-CNN"), tmp_path / "model.pth")
    with pytest.raises(UserError, match="does not contain the model that the config describes"):
        load_weights(build_model(config("Faster R-CNN", 3)), path)


def test_no_weights():
    model = nn.Linear(1, 1)
    before = initialised(model)
    start_from(model, "", NAMES)
    assert_equal(model.state_dict(), before)


# Names in the checkpoint


def test_class_names_are_saved(tmp_path):
    checkpointer = BalancedCheckpointer(nn.Linear(1, 1), str(tmp_path), class_names=("a", "b"))
    checkpointer.save("model_0000001", iteration=1)
    content = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert content["class_names"] == ["a", "b"]
    theirs = DetectionCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / "model_0000001.pth"))
    assert theirs["class_names"] == ["a", "b"] and theirs["iteration"] == 1
    BalancedCheckpointer(nn.Linear(1, 1), str(tmp_path)).save("unnamed")
    assert "class_names" not in torch.load(tmp_path / "unnamed.pth", weights_only=True)


def test_names_of_the_training_data():
    register_coco("named", "none.json", "none")
    try:
        cfg = config("Faster R-CNN", 2)
        cfg.DATASETS.TRAIN = ()
        assert training_classes(cfg) is None
        cfg.DATASETS.TRAIN = ("named",)
        assert training_classes(cfg) is None  # before they are loaded
        MetadataCatalog.get("named").thing_classes = ["a", "b"]
        assert training_classes(cfg) == ["a", "b"]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1  # as with a mapper that changes classes
        assert training_classes(cfg) is None
    finally:
        DatasetCatalog.remove("named")
        MetadataCatalog.pop("named", None)


# From beginning to end


@pytest.fixture
def people(tmp_path):
    """Data of three classes, of which one, or two, are in COCO."""
    file = write_coco(tmp_path / "people", num_images=4)
    content = json.loads(file.read_text())
    for category, name in zip(content["categories"], NAMES):
        category["name"] = name
    content["categories"].append({**content["categories"][0], "id": 3, "name": NAMES[2]})
    file.write_text(json.dumps(content))
    return file


def train(train_net_here, people, output, *options):
    return train_net_here(
        *options[:1] if options[:1] == ("--resume",) else (),
        *("--register", "people", people, people.parent / "images"),
        *("DATASETS.TRAIN", "('people',)", "DATASETS.TEST", "()", "OUTPUT_DIR", output),
        *(*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0", "SOLVER.STEPS", "()"),
        *("DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "1", "SEED", "1"),
        *("SOLVER.AMP.ENABLED", "False"),
        *(options[1:] if options[:1] == ("--resume",) else options),
        config="configs/COCO-Detection/balanced_faster_rcnn_R_50_FPN_1x.yaml",
    )


def test_train_net(people, tmp_path, train_net_here):
    """With a learning rate of 0, so that what was loaded is what is saved."""
    theirs = build_model(config("Faster R-CNN", 80, plain=True)).state_dict()
    weights, output = write(theirs, tmp_path / "zoo.pkl"), tmp_path / "output"
    result = train(train_net_here, people, output, "MODEL.WEIGHTS", weights)
    assert result.returncode == 0, result.stderr
    text = result.stdout + result.stderr
    assert text.count("what the model starts with") == 1
    assert "(2 of 3 classes: traffic_light, Person)" in text
    assert "Skip loading" not in text and "not found in the checkpoint" not in text
    assert text.count("WARNING") <= 3, text
    content = torch.load(output / "model_final.pth", weights_only=True)
    assert content["class_names"] == NAMES
    key = "roi_heads.box_predictor.cls_score.weight"
    for row, source in {**SOURCES, 3: 80}.items():
        assert torch.equal(content["model"][key][row], theirs[key][source])

    result = train(train_net_here, people, output, "--resume", "SOLVER.MAX_ITER", "2")
    assert result.returncode == 0 and "what the model starts with" not in result.stdout
    again = torch.load(output / "model_final.pth", weights_only=True)
    assert again["iteration"] == 1 and again["class_names"] == NAMES


def test_train_net_refuses_what_does_not_fit(people, tmp_path, train_net_here):
    weights = write({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    result = train(train_net_here, people, tmp_path / "output", "MODEL.WEIGHTS", weights)
    assert_user_error(
        result, "error: MODEL.WEIGHTS: ", "resnet.pth does not fit the model", "torchvision"
    )
