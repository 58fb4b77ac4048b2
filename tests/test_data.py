"""Datasets: loading, what is dropped, what is refused, and the generated shapes."""

import json
import logging
import os
from collections import Counter

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from balanced_d2 import load_config
from balanced_d2.data import check_datasets, load_coco, register_coco
from balanced_d2.data.datasets.shapes import (
    CLASSES,
    HUES,
    SPLITS,
    ShapesConfig,
    draw_image,
    ensure_shapes,
)
from balanced_d2.utils.errors import UserError

from .conftest import run_program


@pytest.fixture
def name():
    """A name for a dataset, available again after the test."""
    yield "test_data"
    if "test_data" in DatasetCatalog:
        DatasetCatalog.remove("test_data")
    MetadataCatalog.pop("test_data", None)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def dataset(**changes):
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 50, "height": 40}],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 8, "image_id": 1, "category_id": 1, "bbox": [1, 2, 0, 4], "iscrowd": 0},
            {"id": 9, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, -1], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "thing"}],
        **changes,
    }


def test_renumbered_categories_cause_no_warning(tmp_path, name, caplog):
    annotation = {"id": 7, "image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4], "iscrowd": 0}
    content = dataset(annotations=[annotation], categories=[{"id": 5, "name": "thing"}])
    json_file = write(tmp_path / "a.json", content)
    with caplog.at_level(logging.INFO):
        (record,) = load_coco(name, json_file, str(tmp_path))
    assert record["annotations"][0]["category_id"] == 0
    assert "Loaded 1 images" in caplog.text and "mapping" not in caplog.text


def test_degenerate_boxes_are_dropped_with_one_warning(tmp_path, name, caplog):
    json_file = write(tmp_path / "a.json", dataset())
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        for _ in range(3):
            (record,) = load_coco(name, json_file, str(tmp_path))
    assert [annotation["id"] for annotation in record["annotations"]] == [7]
    (warning,) = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert "dropped 2 annotation(s)" in warning
    assert "annotation 8" in warning and "annotation 9" in warning and "a.jpg" in warning


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"images": [', "not a valid annotation file: Expecting value"),
        ("[]", "not a valid annotation file"),
        ({}, "not a valid annotation file"),
        (dataset(categories=[]), "not a valid annotation file"),
        (dataset(images=[{"id": 1}]), "no 'file_name'"),
        (
            dataset(annotations=[{"id": 3, "image_id": 1, "category_id": 5, "bbox": [1, 1, 2, 2]}]),
            "unknown category 5",
        ),
        (
            dataset(annotations=[{"id": 3, "image_id": 1, "category_id": 1}]),
            "have no valid bbox (4 numbers): annotation 3",
        ),
        (
            dataset(
                annotations=[{"id": 3, "image_id": 1, "category_id": 1, "bbox": [1, 2, "x", 4]}]
            ),
            "have no valid bbox (4 numbers): annotation 3",
        ),
    ],
)
def test_broken_annotation_files(tmp_path, name, content, message):
    json_file = write(tmp_path / "a.json", content)
    with pytest.raises(UserError) as error:
        load_coco(name, json_file, str(tmp_path))
    assert message in str(error.value) and json_file in str(error.value)


def test_missing_files(tmp_path, name):
    with pytest.raises(UserError, match="annotation file .*missing.json does not exist"):
        load_coco(name, str(tmp_path / "missing.json"), str(tmp_path))
    json_file = write(tmp_path / "a.json", dataset())
    with pytest.raises(UserError, match="image folder .*nowhere does not exist"):
        load_coco(name, json_file, str(tmp_path / "nowhere"))


def test_a_name_is_registered_once(tmp_path, name):
    register_coco(name, "a.json", "images")
    with pytest.raises(UserError, match="already registered"):
        register_coco(name, "b.json", "images")


def test_check_of_classes(tmp_path, name):
    register_coco(name, write(tmp_path / "a.json", dataset()), str(tmp_path))
    Image.new("RGB", (50, 40)).save(tmp_path / "a.jpg")
    cfg = load_config("", ["DATASETS.TRAIN", f"('{name}',)"])
    with pytest.raises(UserError, match="has 1 classes .thing., but MODEL.ROI_HEADS.NUM_CLASSES"):
        check_datasets(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    check_datasets(cfg)


@pytest.mark.parametrize(
    "opts, train, message",
    [
        ([], True, "DATASETS.TRAIN is empty"),
        (
            ["DATALOADER.SAMPLER_TRAIN", "Sampler"],
            True,
            "unknown DATALOADER.SAMPLER_TRAIN 'Sampler'",
        ),
        ([], False, "DATASETS.TEST is empty"),
        (["DATASETS.TRAIN", "('nowhere',)"], True, "'nowhere' is not registered"),
        (["DATASETS.TEST", "('nowhere',)"], False, "'nowhere' is not registered"),
        (["DATASETS.TEST", "('coco_2014_val',)"], False, "instances_val2014.json does not exist"),
    ],
)
def test_check_of_names(opts, train, message):
    with pytest.raises(UserError, match=message):
        check_datasets(load_config("", opts), train=train)


def test_bccd(bccd_root):
    num_images, num_boxes = {}, {}
    for split in ("train", "val"):
        folder = bccd_root / "bccd"
        records = load_coco(
            f"bccd_{split}_test", str(folder / f"{split}.json"), str(folder / "images")
        )
        num_images[split] = len(records)
        num_boxes[split] = sum(len(record["annotations"]) for record in records)
    # Each split has one degenerate box.
    assert num_images == {"train": 205, "val": 87}
    assert num_boxes == {"train": 2804, "val": 1137}


# The generated dataset


def test_shapes_are_where_the_boxes_say():
    """The largest patch of the class's colour fills the box (except for clutter of that colour)."""
    errors = []
    config = ShapesConfig(shapes_per_image=(1, 1), shape_size=(30.0, 84.0))
    for seed in range(30):
        image, shapes = draw_image(np.random.default_rng(seed), config)
        assert image.shape == (*config.image_size, 3) and image.dtype == np.uint8
        ((category, box),) = shapes
        smooth = cv2.medianBlur(image, 3)
        hue, saturation, _ = np.moveaxis(cv2.cvtColor(smooth, cv2.COLOR_BGR2HSV).astype(int), 2, 0)
        distance = np.abs((hue - HUES[category] + 90) % 180 - 90)
        coloured = ((distance <= 16) & (saturation > 110)).astype(np.uint8)
        *_, patches, _ = cv2.connectedComponentsWithStats(coloured)
        largest = max(patches[1:].tolist(), key=lambda patch: patch[4])
        errors.append(np.abs(np.subtract(largest[:4], box)).max())
    assert np.median(errors) <= 2 and max(errors) <= 15


def test_shapes_overlap_but_stay_visible_and_vary_in_size():
    config = ShapesConfig()
    sizes, classes, overlaps = [], Counter(), 0
    for seed in range(60):
        _, shapes = draw_image(np.random.default_rng(seed), config)
        boxes = [box for _, box in shapes]
        classes.update(category for category, _ in shapes)
        sizes += [max(box[2:]) for box in boxes]
        for i, (ax, ay, aw, ah) in enumerate(boxes):
            for bx, by, bw, bh in boxes[:i]:
                overlaps += ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah
    assert set(classes) == set(range(len(CLASSES)))
    assert min(sizes) < 15 and max(sizes) > 70 and overlaps > 20


def test_shapes_dataset_is_reproducible_and_complete(tmp_path, monkeypatch):
    monkeypatch.setitem(SPLITS, "train", 4)
    monkeypatch.setitem(SPLITS, "val", 2)
    for run in ("a", "b"):
        ensure_shapes(str(tmp_path / run))
    for split, num_images in SPLITS.items():
        a, b = (json.loads((tmp_path / run / f"{split}.json").read_text()) for run in ("a", "b"))
        assert a == b and len(a["images"]) == num_images
        for image in a["images"]:
            pixels = [
                cv2.imread(str(tmp_path / run / split / image["file_name"])) for run in ("a", "b")
            ]
            assert pixels[0].shape == (image["height"], image["width"], 3)
            assert np.array_equal(*pixels)
    contents = {json.dumps(json.loads((tmp_path / "a" / f"{s}.json").read_text())) for s in SPLITS}
    assert len(contents) == 2
    assert {p.name for p in tmp_path.iterdir()} <= {"a", "b", "a.lock", "b.lock"}

    made = os.stat(tmp_path / "a" / "train.json").st_mtime_ns
    ensure_shapes(str(tmp_path / "a"))
    assert os.stat(tmp_path / "a" / "train.json").st_mtime_ns == made
    ensure_shapes(str(tmp_path / "a"), ShapesConfig(seed=1))
    assert json.loads((tmp_path / "a" / "train.json").read_text()) != json.loads(
        (tmp_path / "b" / "train.json").read_text()
    )


def test_shapes_never_replace_another_folder(tmp_path):
    folder = tmp_path / "balanced_shapes"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="is not the generated dataset"):
        ensure_shapes(str(folder))
    assert (folder / "precious.txt").read_text() == "keep"


def test_shapes_in_a_folder_that_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set DETECTRON2_DATASETS to a folder"):
        ensure_shapes(str(tmp_path / "file" / "balanced_shapes"))


def test_names_taken_by_the_user_are_left_alone():
    program = (
        "from detectron2.data import DatasetCatalog\n"
        "DatasetCatalog.register('bccd_train', lambda: ['mine'])\n"
        "from balanced_d2 import load_config\n"
        "assert DatasetCatalog.get('bccd_train') == ['mine']\n"
        "assert {'bccd_val', 'balanced_shapes_train'} <= set(DatasetCatalog)\n"
        "import importlib, balanced_d2.data.datasets.builtin\n"
        "importlib.reload(balanced_d2.data.datasets.builtin)\n"
    )
    result = run_program("-W", "ignore", "-c", program)
    assert result.returncode == 0, result.stderr
