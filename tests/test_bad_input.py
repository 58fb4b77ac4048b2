"""Bad input, as a table: what a user can get wrong, and what the message has to contain."""

import contextlib
import copy
import json
import logging
import math

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BoxMode
from PIL import Image

from balanced_d2 import load_config
from balanced_d2.config.checks import (
    CHOICES_IN_TRAINING,
    UNREGISTERED,
    check_config,
    drop_late_steps,
)
from balanced_d2.config.lazy import read_config
from balanced_d2.data import check_datasets, register_coco
from balanced_d2.data.checks.records import clean
from balanced_d2.data.mapper import ImageMapper
from balanced_d2.engine import build_predictor
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, assert_user_error

NAME = "bad_input"


@pytest.fixture(autouse=True)
def unregister():
    """Remove a test's dataset afterwards."""
    yield
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def annotation(number, **changes):
    box = [1, 2, 30, 20]
    fields = {"id": number, "image_id": 3, "category_id": 1, "bbox": box, "area": 600, "iscrowd": 0}
    return {**fields, **changes}


def good_file():
    return {
        "images": [
            {"id": 3, "file_name": "a.jpg", "width": 50, "height": 40},
            {"id": 4, "file_name": "b.jpg", "width": 50, "height": 40},
        ],
        "annotations": [annotation(7), annotation(8, category_id=2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def with_field(part, index, **fields):
    """A change to a file: fields of an image, annotation or category; None removes a field."""

    def change(content):
        item = content[part][index]
        item.update(fields)
        for key in [key for key, value in fields.items() if value is None]:
            del item[key]

    return change


def with_annotation(*others):
    return lambda content: content["annotations"].extend(others)


def without(part):
    return lambda content: content.pop(part)


def emptied(part):
    return lambda content: content[part].clear()


def check(tmp_path, content, opts=(), **arguments):
    """Do what train_net.py does with a dataset at the start."""
    json_file = tmp_path / "a.json"
    json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    for image in ("a.jpg", "b.jpg"):
        Image.new("RGB", (50, 40)).save(tmp_path / image)
    register_coco(NAME, str(json_file), str(tmp_path))
    names = ["DATASETS.TRAIN", f"('{NAME}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    cfg = load_config("", [*names, *opts])
    check_config(cfg, train=True)
    check_datasets(cfg, **arguments)


def test_good_file(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        check(tmp_path, good_file(), ["DATASETS.TEST", f"('{NAME}',)"])
    assert not caplog.records


TEST_TOO = ["DATASETS.TEST", f"('{NAME}',)"]
MASKS = ["MODEL.MASK_ON", "True"]
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"]
POLYGON = [[1, 2, 31, 2, 31, 22]]
RLE = {"size": [40, 50], "counts": [0, 100, 1900]}
ALL_MASKS = dict.fromkeys((0, 1), {"segmentation": POLYGON})


def with_fields(by_index):
    def change(content):
        for index, fields in by_index.items():
            content["annotations"][index].update(fields)

    return change


def with_keypoint_names(change):
    def both(content):
        for category in content["categories"]:
            category["keypoints"] = ["left", "right"]
        change(content)

    return both


TWO_POINTS = {"keypoints": [1, 2, 2, 3, 4, 2]}

# A change to a good annotation file, config options, and what the error has to contain.
FILES = {
    "cut off": ('{"images": [', [], ["not a valid annotation file"]),
    "not text": ("\x00\x01", [], ["not a valid annotation file"]),
    "a list": ("[]", [], ["not a valid annotation file", "not an object"]),
    "no images": (without("images"), [], ["not a valid annotation file", "no 'images'"]),
    "no annotations": (without("annotations"), [], ["no 'annotations'"]),
    "no categories": (without("categories"), [], ["no 'categories'"]),
    "images are no list": (lambda c: c.update(images={"3": {}}), [], ["'images' is not a list"]),
    "annotations of numbers": (
        lambda c: c.update(annotations=[1]),
        [],
        ["'annotations' is not a list of objects"],
    ),
    "empty images": (emptied("images"), [], ["'images' is empty"]),
    "empty categories": (emptied("categories"), [], ["'categories' is empty"]),
    "image without id": (with_field("images", 1, id=None), [], ["1 image(s) have no valid id"]),
    "image without file_name": (
        with_field("images", 1, file_name=None),
        [],
        ["1 image(s) have no 'file_name': image 4"],
    ),
    "image without width": (
        with_field("images", 1, width=None),
        [],
        ["no valid 'width' and 'height': image 4 (None x 40)"],
    ),
    "image of height 0": (with_field("images", 1, height=0), [], ["image 4 (50 x 0)"]),
    "width in words": (with_field("images", 1, width="wide"), [], ["image 4 ('wide' x 40)"]),
    "image twice": (
        with_field("images", 1, id=3),
        [],
        ["1 image id(s) occur more than once: image 3 (2 times)"],
    ),
    "category twice": (
        with_field("categories", 1, id=1),
        [],
        ["1 category id(s) occur more than once: category 1 (2 times)"],
    ),
    "category without name": (
        with_field("categories", 1, name=None),
        [],
        ["categories have no 'name': category 2"],
    ),
    "category id in words": (with_field("categories", 1, id="two"), [], ["number 2 in the file"]),
    "annotation of no image": (
        with_annotation(annotation(9, image_id=99), annotation(10, image_id=98)),
        [],
        ["2 annotation(s) belong to no image", "annotation 9 (image 99), annotation 10 (image 98)"],
    ),
    "image_id is a list": (
        with_annotation(annotation(9, image_id=[3])),
        [],
        ["annotation 9 (image [3])"],
    ),
    "annotation of no category": (
        with_annotation(annotation(9, category_id=5)),
        [],
        ["1 annotation(s) belong to no category in the file: annotation 9 (category 5)"],
    ),
    "category_id in words": (
        with_annotation(annotation(9, category_id="one")),
        [],
        ["annotation 9 (category 'one')"],
    ),
    "no bbox": (
        with_field("annotations", 1, bbox=None),
        [],
        ["1 annotation(s) have no valid bbox (4 numbers): annotation 8 (image 3)"],
    ),
    "bbox of three": (with_field("annotations", 1, bbox=[1, 2, 3]), [], ["annotation 8 (image 3)"]),
    "bbox in words": (
        with_field("annotations", 1, bbox=[1, 2, "x", 4]),
        [],
        ["have no valid bbox", "annotation 8 (image 3)"],
    ),
    "bbox with NaN": (
        with_field("annotations", 1, bbox=[1, 2, math.nan, 4]),
        [],
        ["1 annotation(s) have a bbox with NaN or infinity: annotation 8 (image 3)"],
    ),
    "bbox with infinity": (
        with_field("annotations", 1, bbox=[1, 2, math.inf, 4]),
        [],
        ["have a bbox with NaN or infinity: annotation 8 (image 3)"],
    ),
    "ignore": (with_field("annotations", 1, ignore=1), [], ['marked "ignore"', "annotation 8"]),
    "keypoints that are no triples": (
        with_field("annotations", 1, keypoints=[1, 2]),
        [],
        ["not a list of x, y, visibility: annotation 8"],
    ),
    "more than ten": (
        with_annotation(*(annotation(n, image_id=99) for n in range(100, 130))),
        [],
        ["30 annotation(s) belong to no image", "annotation 109 (image 99), ...; refused"],
    ),
    "several mistakes": (
        with_annotation(annotation(7, category_id=5), annotation(9, image_id=99)),
        [],
        ["; 1 annotation(s) belong to no category", "annotation(s) belong to no image"],
    ),
    "no annotation": (emptied("annotations"), [], ["no usable annotation"]),
    "only crowds": (
        with_fields(dict.fromkeys((0, 1), {"iscrowd": 1})),
        [],
        [f"DATASETS.TRAIN ({NAME})", "no usable annotation"],
    ),
    "only empty boxes": (
        with_fields(dict.fromkeys((0, 1), {"bbox": [1, 2, 0, 4]})),
        [],
        ["no usable annotation"],
    ),
    "no masks": (
        lambda content: None,
        MASKS,
        ["2 annotation(s) have no segmentation, but MODEL.MASK_ON", "annotation 7 of"],
    ),
    "one mask missing": (
        with_fields({0: ALL_MASKS[0]}),
        MASKS,
        ["1 annotation(s) have no segmentation", "annotation 8 of"],
    ),
    "RLE as polygons": (
        with_fields({0: ALL_MASKS[0], 1: {"segmentation": RLE}}),
        MASKS,
        ["INPUT.MASK_FORMAT is polygon: annotation 8 of"],
    ),
    "no keypoints": (lambda content: None, KEYPOINTS, ["no annotation has keypoints", "KEYPOINT"]),
    "keypoints without names": (
        with_fields({0: TWO_POINTS, 1: TWO_POINTS}),
        KEYPOINTS,
        ["its keypoints have no names"],
    ),
    "keypoints that nobody sees": (
        with_keypoint_names(
            lambda content: [a.update(keypoints=[1, 2, 0] * 2) for a in content["annotations"]]
        ),
        [*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"],
        ["no image has a visible keypoint", "MIN_KEYPOINTS_PER_IMAGE, 1"],
    ),
    "one without keypoints": (
        with_keypoint_names(with_fields({0: TWO_POINTS})),
        KEYPOINTS,
        ["annotation(s) have no keypoints, but others in their image do: annotation 8 of"],
    ),
    "other number of keypoints": (
        with_keypoint_names(with_fields({0: TWO_POINTS, 1: TWO_POINTS})),
        [*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"],
        ["NUM_KEYPOINTS, which is 3: annotation 7 of", "a.jpg (2)"],
    ),
    "keypoints without sigmas": (
        with_keypoint_names(with_fields({0: TWO_POINTS, 1: TWO_POINTS})),
        [*KEYPOINTS, *TEST_TOO],
        ["TEST.KEYPOINT_OKS_SIGMAS has 0 values", "2 keypoints"],
    ),
    "more classes than the model": (
        lambda content: content["categories"].append({"id": 3, "name": "bird"}),
        [],
        ["has 3 classes (cat, dog, bird)", "MODEL.ROI_HEADS.NUM_CLASSES is 2"],
    ),
    "fewer classes than RetinaNet": (
        lambda content: None,
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
        ["has 2 classes", "MODEL.RETINANET.NUM_CLASSES is 80"],
    ),
}


@pytest.mark.parametrize("change, opts, parts", FILES.values(), ids=FILES.keys())
def test_bad_files(tmp_path, change, opts, parts):
    content = change
    if callable(change):
        content = copy.deepcopy(good_file())
        change(content)
    with pytest.raises(UserError) as error:
        check(tmp_path, content, opts)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    if "TEST" not in message and "TRAIN" not in message:
        assert repr(NAME) in message


def test_ten_examples_at_most(tmp_path):
    content = good_file()
    content["annotations"] += [annotation(n, image_id=99) for n in range(100, 130)]
    with pytest.raises(UserError) as error:
        check(tmp_path, content)
    assert str(error.value).count("(image 99)") == 10


# Dropped or clipped boxes in an image of 50 x 40: the box, the warning, and what is kept of it.
BOXES = {
    "no width": ([5, 5, 0, 4], "dropped 1 annotation(s) whose box has no width or height", None),
    "negative height": ([5, 5, 3, -4], "dropped 1 annotation(s) whose box has no width", None),
    "right of the image": ([50, 5, 9, 9], "dropped 1 annotation(s) whose box is outside", None),
    "above the image": ([5, -9, 9, 9], "dropped 1 annotation(s) whose box is outside", None),
    "over the edge": ([45, 30, 9, 20], "clipped 1 annotation(s) whose box is", [45, 30, 5, 10]),
    "over the corner": ([-5, -6, 10, 20], "clipped 1 annotation(s) whose box is", [0, 0, 5, 14]),
    "over by rounding": ([45, 30, 5.1, 10.2], None, [45, 30, 5, 10]),
    "up to the edge": ([45, 30, 5, 10], None, [45, 30, 5, 10]),
}


@pytest.mark.parametrize("iscrowd", [0, 1])
@pytest.mark.parametrize("mode", [BoxMode.XYWH_ABS, BoxMode.XYXY_ABS])
@pytest.mark.parametrize("box, warning, kept", BOXES.values(), ids=BOXES.keys())
def test_boxes_are_cleaned(box, warning, kept, mode, iscrowd, caplog):
    def in_mode(xywh):
        return BoxMode.convert([float(v) for v in xywh], BoxMode.XYWH_ABS, mode)

    records = [record(box=in_mode(box), bbox_mode=mode, iscrowd=iscrowd), record()]
    before = copy.deepcopy(records)
    name = f"{box} {mode} {iscrowd}"  # warnings are given once
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        cleaned = clean(name, records)
        again = clean(name, cleaned)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == (warning is not None)
    if warning:
        assert warning in messages[0] and "annotation 7 of a.jpg" in messages[0]
        assert repr(name) in messages[0]
    boxes = [a["bbox"] for a in cleaned[0]["annotations"]]
    assert boxes == ([] if kept is None else [pytest.approx(in_mode(kept))])
    assert records == before and cleaned[1] == records[1]
    assert [len(r["annotations"]) for r in again] == [len(boxes), 1]


def record(box=(1.0, 2.0, 30.0, 20.0), **changes):
    """A record such as a user's own function returns."""
    fields = {"id": 7, "bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    size = {key: changes.pop(key, value) for key, value in (("width", 50), ("height", 40))}
    size = {key: value for key, value in size.items() if value is not None}
    return {"file_name": "a.jpg", "image_id": 3, **size, "annotations": [{**fields, **changes}]}


RECORDS = {
    "category beyond the classes": ({"category_id": 2}, "from 0 to 1, the last class"),
    "negative category": ({"category_id": -1}, "annotation 7 of a.jpg (category_id -1)"),
    "category as a float": ({"category_id": 1.0}, "(category_id 1.0)"),
    "no category": ({"category_id": None}, "(category_id None)"),
    "box with NaN": ({"box": (1, 2, math.nan, 4)}, "NaN or infinity: annotation 7 of a.jpg"),
    "box with infinity": ({"box": (-math.inf, 2, 3, 4)}, "NaN or infinity: annotation 7"),
    "box of five": ({"box": (1, 2, 3, 4, 5)}, "no valid bbox (4 numbers): annotation 7 of a.jpg"),
    "box in words": ({"box": "1234"}, "no valid bbox (4 numbers): annotation 7 of a.jpg"),
    "no bbox_mode": ({"bbox_mode": None}, "bbox_mode that cannot be trained on: annotation 7"),
    "relative box": ({"bbox_mode": BoxMode.XYXY_REL}, "bbox_mode that cannot be trained on"),
}


@pytest.mark.parametrize("changes, message", RECORDS.values(), ids=RECORDS.keys())
def test_bad_records(changes, message):
    """In a dataset that is not a COCO file, found by the check at the start."""
    DatasetCatalog.register(NAME, lambda: [record(), record(**changes)])
    MetadataCatalog.get(NAME).set(thing_classes=["cat", "dog"])
    cfg = load_config("", ["DATASETS.TRAIN", f"('{NAME}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"])
    with pytest.raises(UserError) as error:
        check_datasets(cfg)
    assert message in str(error.value) and repr(NAME) in str(error.value)
    check_datasets(cfg, annotations=False)


def test_records_that_are_left_alone(caplog):
    unsized = record(box=(-5, -5, 500, 500), width=None, height=None)
    rotated = record(box=(100, 100, 20, 30, 45), bbox_mode=BoxMode.XYWHA_ABS)
    unlabelled = {"file_name": "b.jpg", "width": 5, "height": 4}
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        records = [unsized, rotated, unlabelled]
        assert clean("left alone", records) == records
    assert clean("left alone", []) == [] and not caplog.records


def test_annotations_without_id_are_counted():
    bad = record(box=(1, 2, math.nan, 4))
    del bad["annotations"][0]["id"]
    bad["annotations"].insert(0, record()["annotations"][0])
    with pytest.raises(UserError, match="annotation number 2 of a.jpg"):
        clean("without id", [bad])


def test_check_of_annotations_can_be_skipped(tmp_path):
    content = good_file()
    del content["annotations"][0]["area"]
    with_annotation(annotation(9, image_id=99))(content)
    check(tmp_path, content, TEST_TOO, annotations=False)
    # The comparison of classes is skipped too, for a mapper that changes them.
    cfg = load_config("", ["DATASETS.TRAIN", f"('{NAME}',)"])
    check_datasets(cfg, annotations=False)


def test_evaluation_needs_no_annotations(tmp_path):
    """As with COCO's test images."""
    content = good_file()
    del content["annotations"]
    check(tmp_path, content, TEST_TOO, train=False)


# Options on the command line, and what the error has to contain.
OPTIONS = {
    "unknown key": (["SOLVER.MAX_ITERS", "3"], "did you mean SOLVER.MAX_ITER?"),
    "no value": (["SEED"], "'SEED' has no value"),
    "dataset as a string": (["DATASETS.TRAIN", "bccd_train"], "DATASETS.TRAIN is bccd_train"),
    "brackets without comma": (["DATASETS.TRAIN", "('bccd_train')"], "has to be of type tuple"),
    "names without comma": (["DATASETS.TRAIN", "('a' 'b',)"], "'ab' is not registered"),
    "no dataset": (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
    "unregistered": (["DATASETS.TRAIN", "('nowhere',)"], "'nowhere' is not registered"),
    "unregistered test": (["DATASETS.TEST", "('nowhere',)"], "'nowhere' is not registered"),
}


@pytest.mark.parametrize("opts, message", OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(opts, message):
    with pytest.raises(UserError) as error:
        check_datasets(load_config("", ["DATASETS.TRAIN", "('balanced_shapes_train',)", *opts]))
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_string_instead_of_a_tuple(key):
    """Set in Python, where yacs does not check the type."""
    cfg = load_config("", ["DATASETS.TRAIN", "('a',)"])
    cfg.DATASETS[key] = "bccd_train"
    with pytest.raises(UserError, match=rf"DATASETS.{key} is the string.*\('bccd_train',\)"):
        check_datasets(cfg)


@pytest.mark.parametrize(
    "opts, steps, warning",
    [
        (["SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"], (), None),
        (["SOLVER.MAX_ITER", "2", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], (30000,), None),
        (["SOLVER.MAX_ITER", "9", "SOLVER.STEPS", "(3, 8)"], (3, 8), None),
        (["SOLVER.MAX_ITER", "9", "SOLVER.STEPS", "(3, 9)"], (3,), ": 9 dropped"),
        (["SOLVER.MAX_ITER", "9", "SOLVER.STEPS", "(10, 20)"], (), ": 10, 20 dropped"),
        (["SOLVER.MAX_ITER", "2"], (), ": 30000 dropped"),
    ],
)
def test_steps_beyond_the_end_are_dropped(opts, steps, warning, caplog):
    cfg = load_config("", opts)
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        drop_late_steps(cfg)
    assert steps == cfg.SOLVER.STEPS
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (warning is not None)
    assert warning is None or (warning in messages[0] and "SOLVER.MAX_ITER" in messages[0])


NEGATIVES = ("MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "iou_balanced")
POSITIVES = ("MODEL.ROI_HEADS.POSITIVE_SAMPLER", "instance_balanced")
LOSS = ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "balanced_l1")
RETINANET_LOSS = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "balanced_l1")
PYRAMID = ("MODEL.BALANCED_FPN.ENABLED", "True")
RETINANET = ("MODEL.META_ARCHITECTURE", "RetinaNet")
BALANCED_RETINANET = ("MODEL.META_ARCHITECTURE", "BalancedRetinaNet")
HEADS = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads")
FPN_BACKBONE = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")


@pytest.mark.parametrize(
    "opts, advice",
    [
        (NEGATIVES + HEADS, "set that to BalancedROIHeads or BalancedCascadeROIHeads"),
        (POSITIVES + HEADS, "set that to BalancedROIHeads or BalancedCascadeROIHeads"),
        (LOSS + HEADS, "set that to BalancedROIHeads or BalancedCascadeROIHeads"),
        (PYRAMID + FPN_BACKBONE, "set it to build_balanced_fpn_backbone"),
        (PYRAMID + FPN_BACKBONE + BALANCED_RETINANET, "to build_balanced_retinanet_fpn_backbone"),
        (NEGATIVES + BALANCED_RETINANET, "BalancedRetinaNet has no RoI heads"),
        (POSITIVES + RETINANET, "RetinaNet has no RoI heads"),
        (LOSS + BALANCED_RETINANET, "BalancedRetinaNet has no RoI heads"),
        (RETINANET_LOSS + RETINANET, "set that to BalancedRetinaNet"),
        (RETINANET_LOSS, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE is the key for R-CNN"),
    ],
)
def test_balances_without_effect_are_refused(opts, advice, caplog):
    cfg = load_config("", opts)
    with pytest.raises(UserError) as error:
        check_config(cfg, train=True)
    assert opts[0] in str(error.value) and advice in str(error.value)
    # Training started by balanced_d2 0.1.0, with its defaults, can be evaluated and resumed.
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        check_config(cfg, train=False)
        check_config(cfg, train=True, resume=True)
    assert [record.getMessage() for record in caplog.records] == [str(error.value)] * 2


@pytest.mark.parametrize(
    "opts",
    [
        HEADS + FPN_BACKBONE,
        RETINANET,
        NEGATIVES + POSITIVES + LOSS + ("MODEL.ROI_HEADS.NAME", "BalancedROIHeads"),
        NEGATIVES + LOSS + ("MODEL.ROI_HEADS.NAME", "BalancedCascadeROIHeads"),
        RETINANET_LOSS + BALANCED_RETINANET,
        PYRAMID + ("MODEL.BACKBONE.NAME", "build_balanced_fpn_backbone"),
    ],
)
def test_balances_of_classes_that_support_them(opts, caplog):
    check_config(load_config("", opts), train=True)
    assert not caplog.records


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.MAX_ITER", "0", "SOLVER.MAX_ITER is 0; it has to be at least 1"),
        ("SOLVER.MAX_ITER", "-3", "SOLVER.MAX_ITER is -3"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "CHECKPOINT_PERIOD is 0; it has to be at least 1"),
        ("SOLVER.WEIGHT_DECAY", "-0.1", "WEIGHT_DECAY is -0.1; it has to be at least 0"),
        ("DATALOADER.NUM_WORKERS", "-1", "NUM_WORKERS is -1; it has to be at least 0"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "INPUT.MIN_SIZE_TRAIN is empty"),
        ("INPUT.MIN_SIZE_TRAIN", "(64, -1)", r"INPUT.MIN_SIZE_TRAIN is \(64, -1\)"),
        ("INPUT.MIN_SIZE_TEST", "-4", "INPUT.MIN_SIZE_TEST is -4"),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "0", "MODEL.RPN.BATCH_SIZE_PER_IMAGE is 0"),
        ("SOLVER.BASE_LR", "-0.1", "SOLVER.BASE_LR is -0.1; it has to be at least 0"),
    ],
)
def test_numbers_that_cannot_be(key, value, message):
    cfg = load_config(str(ROOT / TINY_CONFIG), [key, value])
    with pytest.raises(UserError, match=message):
        check_config(cfg, train=True)
    if key.startswith(("SOLVER", "MODEL")):
        check_config(cfg, train=False)  # which does not use them


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("INPUT.FORMAT", "BRG", "INPUT.FORMAT is 'BRG'; choose one of: BGR,"),
        ("INPUT.MASK_FORMAT", "bitmaks", "one of: polygon, bitmask"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "rang", "one of: choice, range"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "needs the least and the largest size"),
        ("INPUT.RANDOM_FLIP", "both", "one of: horizontal, vertical, none"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Anchors", "MODEL.ANCHOR_GENERATOR.NAME: there is no"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPM", "there is no 'RPM'; did you mean RPN?"),
        ("MODEL.RPN.HEAD_NAME", "StdRPNHead", "did you mean StandardRPNHead?"),
        ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFC", "did you mean FastRCNNConvFCHead?"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "one of: value, norm"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosine", "one of: WarmupMultiStepLR, WarmupCosineLR"),
        ("SOLVER.OPTIMIZER", "Adam", "SOLVER.OPTIMIZER is 'Adam'; choose one of: SGD, AdamW"),
        ("SOLVER.WARMUP_METHOD", "lin", "one of: constant, linear"),
    ],
)
def test_names_that_there_are_not(key, value, message):
    with pytest.raises(UserError) as error:
        check_config(load_config(str(ROOT / TINY_CONFIG), [key, value]), train=True)
    for part in (key, repr(value), message):
        assert part in str(error.value)


@pytest.mark.parametrize("part", ["MASK", "KEYPOINT"])
def test_names_of_parts_that_a_model_does_not_have(part):
    """Detectron2 does not look at them, and they may be of a project that is not imported."""
    options = [f"MODEL.ROI_{part}_HEAD.NAME", "Elsewhere", f"MODEL.{part}_ON"]
    check_config(load_config("", [*options, "False"]), train=True)
    with pytest.raises(UserError, match=f"MODEL.ROI_{part}_HEAD.NAME: there is no 'Elsewhere'"):
        load_config("", [*options, "True"])


@pytest.mark.parametrize("name", ["BRG", "L"])
def test_formats_that_predictors_do_not_take(name, tmp_path):
    (tmp_path / "weights.pth").touch()
    cfg = load_config("", ["MODEL.WEIGHTS", f"{tmp_path}/weights.pth", "INPUT.FORMAT", name])
    with pytest.raises(UserError, match=f"INPUT.FORMAT '{name}'; choose one of: BGR, RGB"):
        build_predictor(cfg, "draw")


def test_every_choice_is_one_of_detectron2s():
    """What the checks let through can be built, whatever the version."""
    options = ["SOLVER.STEPS", "(1,)", "SOLVER.MAX_ITER", "20", "INPUT.MIN_SIZE_TRAIN", "(8, 9)"]
    options += ["SOLVER.WARMUP_ITERS", "1", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
    model = torch.nn.Linear(1, 1)
    for key, values in CHOICES_IN_TRAINING.items():
        for value in values:
            cfg = load_config("", [*options, key, value])
            check_config(cfg, train=True)
            build_lr_scheduler(cfg, build_optimizer(cfg, model))
            ImageMapper(cfg, is_train=True)
    for key in UNREGISTERED:
        check_config(load_config("", [key, UNREGISTERED[key]]), train=True)


@pytest.mark.parametrize("sizes, is_right", [("(8, 9)", 1), ("(9, 9)", 1), ("(9, 8)", 0)])
def test_a_range_of_sizes(sizes, is_right):
    options = ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", sizes]
    cfg = load_config("", options)
    with contextlib.nullcontext() if is_right else pytest.raises(UserError, match=r"is \(9, 8\)"):
        check_config(cfg, train=True)


@pytest.mark.parametrize("steps", [(), (5,), (5, 9), (9, 5), (5, 5), (0, 5), (-1, 5)])
def test_steps_are_those_that_detectron2_takes(steps):
    cfg = load_config("", ["SOLVER.MAX_ITER", "20", "SOLVER.STEPS", str(steps)])
    try:
        build_lr_scheduler(cfg, build_optimizer(cfg, torch.nn.Linear(1, 1)))
        check_config(cfg, train=True)
    except UserError:
        raise
    except ValueError:
        with pytest.raises(UserError, match=r"SOLVER.STEPS is \(.* larger than the one before"):
            check_config(cfg, train=True)
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"  # which has no steps
    check_config(cfg, train=True)


@pytest.mark.parametrize(
    "size, processes, message",
    [
        (4, 8, r"\(SOLVER.IMS_PER_BATCH\) is 4; it has to be a multiple of .* processes, 8"),
        (6, 4, r"is 6; it has to be a multiple of the number of processes, 4"),
        (0, 1, r"is 0; it has to be a multiple of the number of processes, 1"),
        (4, 2, r"ACCUMULATE is 3, but each process has only 2 of the SOLVER.IMS_PER_BATCH 4"),
    ],
)
def test_batches_that_cannot_be_divided(size, processes, message, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
    options = ["SOLVER.IMS_PER_BATCH", str(size), "SOLVER.ACCUMULATE", "3" if size == 4 else "1"]
    with pytest.raises(UserError, match=message):
        check_config(load_config("", options), train=True)
    # Detectron2 scales this batch to 12 images for each process.
    scaled = ["SOLVER.IMS_PER_BATCH", "12", "SOLVER.REFERENCE_WORLD_SIZE", "1"]
    check_config(load_config("", scaled), train=True)
    lazy = read_config(str(ROOT / "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.py"))
    lazy.lazy.dataloader.train.total_batch_size = size
    lazy.SOLVER.ACCUMULATE = 3 if size == 4 else 1
    with pytest.raises(UserError, match="dataloader.train.total_batch_size"):
        check_config(lazy, train=True)


def test_start_of_training_reports_everything_at_once(tmp_path, train_net_here):
    """End to end: one line, and nothing is trained."""
    content = good_file()
    with_annotation(annotation(7, category_id=5), annotation(9, image_id=99))(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    result = train_net_here(
        *("--register", "own", tmp_path / "a.json", tmp_path),
        *("DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "output"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", "2"),
    )
    assert_user_error(result, "'own'", "(category 5)", "annotation 9 (image 99)")
    assert not list(tmp_path.glob("**/*.pth"))
