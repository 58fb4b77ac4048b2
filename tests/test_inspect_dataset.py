"""tools/inspect_dataset.py: its numbers against plain loops, its advice, its page and its sheet."""

import json
import os
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes, BoxMode
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from balanced_d2 import load_config
from balanced_d2.analysis import dataset, images
from balanced_d2.analysis.dataset import count, largest_overlaps, read_data, spread_in_images
from balanced_d2.analysis.images import find_twins, look_at, perceptual_hash
from balanced_d2.analysis.inspection import inspect, repeat_factors
from balanced_d2.analysis.levels import even_canonical_size, evenness, input_sizes, levels_of
from balanced_d2.data.checks.records import Finding
from balanced_d2.data.image import read_image
from balanced_d2.utils.errors import UserError
from balanced_d2.visualization.crops import SIDE, crop_groups, cut_out
from balanced_d2.visualization.dataset_charts import dataset_charts
from balanced_d2.visualization.dataset_page import write_page
from balanced_d2.visualization.dataset_sheet import draw_dataset_sheet

from .conftest import TINY_CONFIG, TINY_MODEL, assert_user_error, run_program, write_coco
from .test_properties import examples

CLASSES = ["cat", "$5 dog_", "<script>bird</script>"]
CFG = load_config("configs/Base-RCNN-FPN.yaml")
RETINANET = load_config("configs/Base-RetinaNet.yaml")


@pytest.fixture(scope="module", autouse=True)
def named_classes():
    for name in ("train", "val"):
        MetadataCatalog.get(f"inspected_{name}").thing_classes = CLASSES
    yield
    for name in ("train", "val"):
        MetadataCatalog.pop(f"inspected_{name}", None)


def box(category, x, y, width, height, **more):
    mode = {"bbox": [x, y, width, height], "bbox_mode": BoxMode.XYWH_ABS}
    return {**mode, "category_id": category, **more}


def image(*boxes, width=800, height=800, name="nowhere.jpg"):
    return {"file_name": name, "width": width, "height": height, "annotations": list(boxes)}


def inspected(train, val=(), cfg=CFG, **more):
    records = {"inspected_train": list(train)}
    if val:
        records["inspected_val"] = list(val)
    return inspect(cfg, records, {}, **more)


@st.composite
def records_of(draw):
    """A dataset of a few images, with boxes of any size in any place, some of them crowds."""
    result = []
    for _ in range(draw(st.integers(0, 5))):
        width, height = draw(st.integers(8, 2000)), draw(st.integers(8, 2000))
        boxes = []
        for _ in range(draw(st.integers(0, 6))):
            x, y = draw(st.floats(0, width - 2)), draw(st.floats(0, height - 2))
            size = draw(st.floats(1, width - x)), draw(st.floats(1, height - y))
            crowd = {"iscrowd": 1} if draw(st.integers(0, 6)) == 0 else {}
            boxes.append(box(draw(st.integers(0, 2)), x, y, *size, **crowd))
        result.append(image(*boxes, width=width, height=height))
    return result


def iou(a, b):
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    common = max(across, 0) * max(down, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return common / (sum(areas) - common)


@pytest.mark.slow
@examples
@given(records_of(), records_of())
def test_numbers_of_random_datasets(train, val):
    splits = {"inspected_train": train, "inspected_val": val}
    data = read_data(splits)
    counts, (of_any, of_class) = count(data), largest_overlaps(data)
    sizes = input_sizes(CFG, data)
    assert data.classes == CLASSES
    number, where = 0, 0
    for split, records in enumerate(splits.values()):
        boxes = [a for r in records for a in r["annotations"] if not a.get("iscrowd")]
        everything = sum(len(record["annotations"]) for record in records)
        assert counts.images[split] == len(records)
        assert counts.boxes[split] == len(boxes)
        assert data.crowds[split] == everything - len(boxes)
        for k in range(3):
            assert counts.class_boxes[split, k] == sum(a["category_id"] == k for a in boxes)
            of_k = [a for a in boxes if a["category_id"] == k]
            having = [r for r in records if any(a is b for a in r["annotations"] for b in of_k)]
            assert counts.class_images[split, k] == len(having)
        empty = 0
        for record in records:
            own = [a for a in record["annotations"] if not a.get("iscrowd")]
            assert counts.per_image[where] == len(own)
            where, empty = where + 1, empty + (not own)
            corners = [
                (x, y, x + width, y + height) for x, y, width, height in (a["bbox"] for a in own)
            ]
            resize = ResizeShortestEdge(800, 1333).get_transform(
                np.broadcast_to(np.uint8(0), (record["height"], record["width"], 3))
            )
            for i, a in enumerate(own):
                others = [j for j in range(len(own)) if j != i]
                same = [j for j in others if own[j]["category_id"] == a["category_id"]]
                for found, among in ((of_any, others), (of_class, same)):
                    expected = max([iou(corners[i], corners[j]) for j in among], default=0)
                    assert found[number] == pytest.approx(expected, abs=1e-6)
                x0, y0, x1, y1 = resize.apply_box(np.array([corners[i]]))[0]
                assert sizes[number] == pytest.approx(np.sqrt((x1 - x0) * (y1 - y0)), rel=1e-4)
                number += 1
        assert counts.empty[split] == empty
    assert number == len(data.boxes)


def test_many_boxes_of_one_image_are_compared_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    boxes = [box(int(rng.integers(3)), *rng.uniform(0, 90, 2), 9, 9) for _ in range(50)]
    data = read_data({"inspected_train": [image(), image(*boxes), image(boxes[0])]})
    whole = largest_overlaps(data)
    monkeypatch.setattr(dataset, "_ROWS", 7)
    np.testing.assert_array_equal(largest_overlaps(data), whole)
    assert whole[0].max() > 0.3 and whole[0][-1] == 0


@pytest.mark.parametrize("size, canonical, level", [(800, 224, 4), (360, 100, 4), (0, 90, 3)])
def test_levels_are_those_of_detectron2(size, canonical, level):
    opts = [*("INPUT.MIN_SIZE_TEST", size), *("MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE", canonical)]
    cfg = load_config(
        "configs/Base-RCNN-FPN.yaml", [*opts, "MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL", level]
    )
    rng = np.random.default_rng(1)
    shapes = [(640, 480), (300, 1000), (777, 333)]
    records, resized = [], []
    for width, height in shapes:
        corner = rng.uniform(0, 50, (400, 2))
        sides = np.exp(rng.uniform(0, np.log([width - 50, height - 50]), (400, 2)))
        records.append(
            image(
                *[box(0, *c, *s) for c, s in zip(corner.tolist(), sides.tolist())],
                width=width,
                height=height,
            )
        )
        scale = np.ones(2)
        if size:
            new = ResizeShortestEdge.get_output_shape(height, width, size, 1333)
            scale = np.array(new[::-1]) / (width, height)
        resized.append(np.concatenate([corner * scale, (corner + sides) * scale], axis=1))
    data = read_data({"inspected_train": records})
    levels, sizes = levels_of(cfg), input_sizes(cfg, data)
    boxes = [Boxes(torch.from_numpy(b)) for b in resized]
    expected = assign_boxes_to_levels(boxes, 2, 5, canonical, level).numpy()
    assert levels.names == ["p2", "p3", "p4", "p5"]
    np.testing.assert_array_equal(levels.of(sizes), expected)
    assert len(set(expected.tolist())) >= 3
    np.testing.assert_allclose(levels.shares(sizes), np.bincount(expected, minlength=4) / 1200)


def test_levels_of_retinanet():
    """The anchors of P3 to P7 are 32 to 512 pixels and larger."""
    levels = levels_of(RETINANET)
    assert levels.names == ["p3", "p4", "p5", "p6", "p7"]
    assert levels.of(np.array([3, 63, 64, 127, 300, 512, 5000])).tolist() == [0, 0, 1, 1, 3, 4, 4]


def test_even_canonical_size():
    assert evenness(np.full(4, 0.25)) == pytest.approx(1)
    assert evenness(np.array([0, 1, 0, 0])) == 0
    sizes = np.exp(np.random.default_rng(2).normal(3.7, 0.8, 2000))
    best, shares = even_canonical_size(CFG, sizes)

    def spread(canonical):
        counts = [0] * 4
        for size in sizes:
            counts[min(max(int(np.floor(4 + np.log2(size / canonical))), 2), 5) - 2] += 1
        return counts, -sum(c / 2000 * np.log(c / 2000) for c in counts if c)

    entropies = {canonical: spread(canonical)[1] for canonical in range(10, 450, 10)}
    assert entropies[best] == pytest.approx(max(entropies.values()))
    assert (2000 * shares).round().astype(int).tolist() == spread(best)[0]


def test_repeat_factors_are_those_of_detectron2():
    rng = np.random.default_rng(3)
    records = [
        image(
            *[
                box(int(k), 1, 1, 9, 9)
                for k in rng.choice(3, rng.integers(1, 4), p=[0.8, 0.15, 0.05])
            ]
        )
        for _ in range(60)
    ]
    (class_images,) = count(read_data({"inspected_train": records})).class_images
    factors = repeat_factors(class_images, len(records), 0.4)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.4)
    for record, factor in zip(records, expected.tolist()):
        own = [factors[a["category_id"]] for a in record["annotations"]]
        assert max(own) == pytest.approx(factor, rel=1e-6)
    assert factors.max() > 1.5 and factors.min() == 1


def test_spread_in_images():
    ratios = spread_in_images(np.array([3.0, 8, 2, 4, 10, 5]), np.array([0, 1, 1, 1, 4, 4]))
    assert ratios.tolist() == [4, 2]
    assert spread_in_images(np.zeros(0), np.zeros(0, dtype=int)).tolist() == []


def test_classes_are_matched_by_name():
    MetadataCatalog.get("inspected_other").thing_classes = [CLASSES[2], "fox", CLASSES[0]]
    try:
        data = read_data(
            {
                "inspected_train": [image(box(1, 1, 1, 5, 5))],
                "inspected_other": [image(*[box(k, 1, 1, 5, 5) for k in range(3)])],
            }
        )
        assert data.classes == [*CLASSES, "fox"]
        assert data.box_classes.tolist() == [1, 2, 3, 0]
    finally:
        MetadataCatalog.pop("inspected_other")
    data = read_data({"inspected_without_names": [image(box(2, 1, 1, 5, 5))]})
    assert data.classes == ["0", "1", "2"]
    MetadataCatalog.pop("inspected_without_names", None)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_size_of_an_image_without_one_in_its_record(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (64, 80)).save(tmp_path / name, exif=exif)
    record = {"file_name": str(tmp_path / name), "annotations": []}
    assert read_image(record["file_name"]).shape == (64, 80, 3)
    assert read_data({"inspected_train": [record]}).sizes.tolist() == [[80, 64]]
    with pytest.raises(UserError, match="nowhere.jpg"):
        read_data({"inspected_train": [{**record, "file_name": "nowhere.jpg"}]})


# Duplicates


def photograph(seed, width=160, height=120):
    """Smooth random blobs, as different from each other as photographs are."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (12, 16), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def distance(a, b):
    return bin(int(a, 16) ^ int(b, 16)).count("1")


def test_perceptual_hash():
    for seed in range(10):
        original = photograph(seed)
        value = perceptual_hash(original)
        assert len(value) == 64
        copies = [
            cv2.resize(original, (97, 71), interpolation=cv2.INTER_AREA),
            cv2.imdecode(cv2.imencode(".jpg", original, [1, 30])[1], cv2.IMREAD_GRAYSCALE),
            (0.7 * original + 20).astype(np.uint8),
        ]
        for copy in copies:
            assert distance(value, perceptual_hash(copy)) <= images.MAX_DISTANCE / 2
        others = [photograph(seed + 100), original[:, ::-1]]
        for other in others:
            assert distance(value, perceptual_hash(other)) > 2 * images.MAX_DISTANCE


@pytest.mark.parametrize("rows", [3, 512])
def test_twins(rows, monkeypatch):
    monkeypatch.setattr(images, "_ROWS", rows)
    rng = np.random.default_rng(4)
    hashes, splits = [], rng.integers(0, 3, 60)
    for i in range(60):
        bits = rng.integers(0, 256, 32, dtype=np.uint8)
        if i > 20 and i % 2:  # near an earlier one
            bits = np.frombuffer(bytes.fromhex(hashes[i - 20] or "00" * 32), np.uint8)
            changed = np.zeros(256, dtype=np.uint8)
            changed[rng.choice(256, rng.integers(0, 50), replace=False)] = 1
            bits = bits ^ np.packbits(changed)
        hashes.append("" if i % 17 == 5 else bits.tobytes().hex())
    twins = find_twins(hashes, splits)
    for i, value in enumerate(hashes):
        for found, same in ((twins.elsewhere, False), (twins.within, True)):
            near = [
                distance(value, other)
                for j, other in enumerate(hashes)
                if value and other and j != i and (splits[j] == splits[i]) == same
            ]
            best = min(near, default=256)
            assert (found[i] >= 0) == (best <= images.MAX_DISTANCE)
            if found[i] >= 0:
                assert distance(value, hashes[found[i]]) == best
                assert (splits[found[i]] == splits[i]) == same
    assert (twins.elsewhere >= 0).sum() > 5 and (twins.within >= 0).sum() > 2
    assert find_twins(["", ""], np.array([0, 1])).elsewhere.tolist() == [-1, -1]


def test_cache(tmp_path, monkeypatch):
    records = []
    for i in range(3):
        path = str(tmp_path / f"{i}.png")
        cv2.imwrite(path, photograph(i))
        records.append({"file_name": path, "width": 160, "height": 120})
    records.append({"file_name": str(tmp_path / "missing.png"), "width": 1, "height": 1})
    opened, cache = [], str(tmp_path / "cache.json")
    decode = images.image_problem

    def image_problem(record):
        opened.append(os.path.basename(record["file_name"]))
        return decode(record)

    monkeypatch.setattr(images, "image_problem", image_problem)
    first = look_at(records, cache)
    assert [look.problem for look in first] == ["", "", "", "does not exist"]
    assert [bool(look.hash) for look in first] == [True, True, True, False]
    opened.clear()
    assert look_at(records, cache) == first and opened == ["missing.png"]
    cv2.imwrite(records[1]["file_name"], photograph(9, 100, 120))
    opened.clear()
    changed = look_at(records, cache)
    assert opened == ["1.png", "missing.png"]
    assert changed[1].problem == "is 100 x 120, not 160 x 120" and changed[0] == first[0]
    wrong = [{"a": 3}, {"a": ["xy", ""]}, {"a": ["0123", ""]}, {"a": [""]}]
    for content in ("", "[]", "{", *(json.dumps({"version": 1, "images": w}) for w in wrong)):
        (tmp_path / "cache.json").write_text(content)
        opened.clear()
        assert look_at(records, cache) == changed and len(opened) == 4


# Advice


def even_boxes(number, category=0):
    """Boxes of one size each, in images of their own, evenly on all four levels."""
    sizes = [60, 150, 300, 600]
    return [image(box(category, 10, 10, sizes[i % 4], sizes[i % 4])) for i in range(number)]


def plain(number=40):
    return [record for k in range(3) for record in even_boxes(number, k)]


def lines(found):
    return [str(line) for line in found.advice if "feature balance" not in line.text]


def only_line(found):
    (line,) = lines(found)
    return line


def test_unremarkable_data_need_no_advice():
    assert lines(inspected(plain(), plain())) == []


def test_advice_on_classes():
    without = [*even_boxes(40, 0), *even_boxes(40, 2)]
    line = only_line(inspected(plain(), without))
    assert line.startswith("inspected_val has no box of $5 dog_: its AP cannot be measured")
    line = only_line(inspected(without, without[:80] + even_boxes(40, 1)))
    assert line.startswith("inspected_train has no box of $5 dog_: it cannot be learnt")
    line = only_line(inspected(plain(), [*plain(), *even_boxes(1, 0)][39:]))
    assert "fewer than 20 boxes of cat (2)" in line


def test_advice_on_rare_classes():
    # 120, 40 and 16 images of 176; the mean is 58.7 images, a third of all.
    data = [*even_boxes(120, 0), *even_boxes(40, 1), *even_boxes(16, 2)]
    line = only_line(inspected(data))
    assert "<script>bird</script>, is in 16 of 176 training images, the average class in 59" in line
    assert "UniformClassTrainingSampler shows it in one of 3 images at least" in line
    assert "REPEAT_THRESHOLD 0.333 its images 1.9 times as often" in line  # sqrt(58.6 / 16)
    cfg = CFG.clone()
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    assert lines(inspected(data, cfg=cfg)) == []


def test_advice_on_empty_images():
    data = [*plain(), *[image()] * 30]
    assert "30 of 150 training images (20 %) have no box" in only_line(inspected(data))
    cfg = CFG.clone()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert lines(inspected(data, cfg=cfg)) == []


def test_advice_on_levels():
    data = [image(box(i % 3, 9, 9, size, size)) for i, size in enumerate((20, 40, 80, 160) * 30)]
    line = only_line(inspected(data))
    assert "At 800 pixels, the levels p2, p3, p4, p5 get 75, 25, 0, 0 %" in line
    size = int(re.search(r"CANONICAL_BOX_SIZE (\d+) \(it is 224\)", line)[1])
    # P3 begins at half of it, P4 at it, P5 at its double.
    assert 20 < size / 2 <= 40 < size <= 80 < 2 * size <= 160
    assert line.endswith("they get 25, 25, 25, 25 %")
    assert not lines(inspected(data, cfg=RETINANET))
    cfg = CFG.clone()
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE = size
    assert lines(inspected(data, cfg=cfg)) == []


def test_advice_on_tiny_and_crowded_boxes():
    tiny = [*plain(), *[image(box(0, 9, 9, 10, 10))] * 30]
    assert "20 % of the training boxes are smaller than 16 pixels at 800" in only_line(
        inspected(tiny)
    )
    # Two boxes with an IoU of 0.6 in each image: one of them will be suppressed.
    pairs = [image(box(0, 9, 9, 100, 100), box(0, 34, 9, 100, 100)) for _ in range(10)]
    line = lines(inspected([*plain(), *pairs]))
    assert any(
        "14 % of the boxes overlap one of their class by an IoU above 0.5" in s for s in line
    )
    mixed = [image(box(0, 9, 9, 100, 100), box(1, 34, 9, 100, 100)) for _ in range(10)]
    assert lines(inspected([*plain(), *mixed])) == []


def test_advice_on_many_boxes():
    many = image(*[box(0, 30 * (i % 20), 30 * (i // 20), 28, 28) for i in range(130)])
    found = lines(inspected([*plain(), many, many]))
    assert any("130 boxes, and TEST.DETECTIONS_PER_IMAGE is 100" in line for line in found)
    assert any("2 % of the training images have more than 128 boxes" in line for line in found)


def test_advice_on_positives():
    data = [image(box(i % 3, 0, 0, 60, 60), box(i % 3, 200, 200, 500, 500)) for i in range(60)]
    assert any("the largest is 8.3 times the size" in line for line in lines(inspected(data)))


def test_advice_on_feature_balance():
    found = inspected([image(box(i % 3, 9, 9, 50, 50)) for i in range(60)], cfg=RETINANET)
    assert "100 % of the training boxes are on p3: between levels" in str(found.advice[-1])
    found = inspected(plain())
    assert "4 levels have 5 % of the training boxes or more" in str(found.advice[-1])
    assert "(MODEL.BALANCED_FPN.ENABLED, now off) is made for such data" in str(found.advice[-1])


def test_advice_on_duplicates():
    hashes = [perceptual_hash(photograph(i)) for i in range(120)]
    looks = [images.Look(value, "") for value in (*hashes, *hashes[:6], *hashes[50:51] * 0)]
    looks += [images.Look(perceptual_hash(photograph(i)), "") for i in range(200, 314)]
    line = only_line(inspected(plain(), plain(), looks=looks))
    assert line.startswith("6 of 120 images of inspected_val (5 %) are nearly the same as one of")


# Pictures


def test_cut_out():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[40:60, 200:240] = (0, 255, 0)
    part = cut_out(picture, np.array([200.0, 40, 240, 60]))
    assert part.shape == (SIDE, SIDE, 3)
    assert part[SIDE // 2, SIDE // 2].tolist() == [0, 255, 0]
    assert (part == (200, 40, 40)).all(axis=2).any()
    # At the border of an image, and of an image that is smaller than what is shown.
    assert cut_out(picture, np.array([0.0, 0, 10, 10])).shape == (SIDE, SIDE, 3)
    assert cut_out(np.zeros((9, 30, 3), np.uint8), np.array([0.0, 0, 3, 3])).shape == (60, SIDE, 3)


@pytest.fixture
def found(tmp_path):
    """An inspection with everything in it: duplicates, findings, missing images."""
    splits, looks = {}, []
    for name in ("train", "val"):
        splits[f"inspected_{name}"] = []
        for i in range(4):
            path = str(tmp_path / f"{name}{i}.png")
            if i:
                cv2.imwrite(path, cv2.applyColorMap(photograph(i), cv2.COLORMAP_JET))
            boxes = [box(k, 8 + 20 * k, 10 + 9 * i, 12 + 3 * k, 14) for k in range(3 if i else 2)]
            splits[f"inspected_{name}"].append(image(*boxes, width=160, height=120, name=path))
            looks.append(images.Look(perceptual_hash(photograph(i)) if i else "", ""))
    finding = Finding(
        "dropped", "annotation(s) whose box has no width or height", ["<b>annotation 3"]
    )
    return inspect(CFG, splits, {"inspected_train": [finding], "inspected_val": []}, looks)


def test_crops(found):
    groups = {group.title: group.crops for group in crop_groups(found)}
    rarest, smallest, largest, duplicates = groups
    assert rarest == "Rarest class: <script>bird</script>" and len(groups[rarest]) == 6
    assert {crop.label for crop in groups[rarest]} == {CLASSES[2]}
    assert groups[smallest][0].label == "cat" and groups[smallest][0].note.startswith("12 × 14")
    assert groups[largest][0].label == CLASSES[2]
    missing = [crop for crop in groups[smallest] if crop.picture is None]
    assert missing and all("cannot read" in crop.note for crop in missing)
    assert [crop.note for crop in groups[duplicates]] == [
        f"{split}{i}.png" for i in (1, 2, 3) for split in ("train", "val")
    ]


def test_page_has_every_figure_and_no_markup_of_the_data(found, tmp_path):
    write_page(found, crop_groups(found), "a & b.yaml", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for chart in dataset_charts(found):
        for _, _, values in chart.rows:
            for text in values:
                assert f"<span>{text}</span>" in page
    assert "<script" not in page and "&lt;script&gt;bird" in page
    assert "&lt;b&gt;annotation 3" in page and "a &amp; b.yaml" in page
    assert "http" not in page and page.count("data:image/jpeg;base64,") >= 20
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page


def test_shares_of_charts(found):
    for chart in dataset_charts(found):
        for i in range(2):
            total = sum(values[i] for _, values, _ in chart.rows)
            assert chart.title == "Classes" or total == pytest.approx(1), chart.title


def test_sheet(found, tmp_path):
    figure = draw_dataset_sheet(found, crop_groups(found), "$1 and $2")
    figure.savefig(tmp_path / "sheet.png")
    assert cv2.imread(str(tmp_path / "sheet.png")).std() > 10
    shown = figure.findobj(Text)
    assert not any(text.get_parse_math() for text in shown if "$" in text.get_text())
    assert any("$5 dog_" in text.get_text() for text in shown)


# The program


def run_tool(*arguments, env=None):
    return run_program("tools/inspect_dataset.py", *arguments, env=env)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a tiny model that has learnt nothing."""
    path = tmp_path_factory.mktemp("model") / "model.pth"
    cfg = load_config(TINY_CONFIG, [*TINY_MODEL, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return path


@pytest.mark.slow
def test_program(tiny_coco, tmp_path, weights):
    val = write_coco(tmp_path / "val", num_images=3, seed=5)
    for name in ("1.jpg", "2.jpg"):  # are in both
        shutil.copy(tiny_coco.parent / "images" / name, val.parent / "images" / name)
    result = run_tool(
        *("mine_train", "mine_val", "--config-file", TINY_CONFIG, "--images"),
        *("--register", "mine_train", tiny_coco, tiny_coco.parent / "images"),
        *("--register", "mine_val", val, val.parent / "images"),
        *("--output", tmp_path / "out", "--iterations", "2"),
        *(*TINY_MODEL, "MODEL.WEIGHTS", weights),
    )
    assert result.returncode == 0, result.stderr
    assert "mine_train: 6 images, 18 boxes, 2 classes" in result.stdout
    assert "2 of 3 images of mine_val (67 %) are nearly the same as one of" in result.stdout
    assert "Of the negatives that random sampling takes" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("images.json", "inspect.html", "inspect.png"),
    ]
    assert cv2.imread(str(tmp_path / "out" / "inspect.png")).std() > 10
    assert "Hard negatives" in (tmp_path / "out" / "inspect.html").read_text()


def test_bad_input(tiny_coco, tmp_path, run_here):
    register = ["--register", "mine", tiny_coco, tiny_coco.parent / "images"]

    def run(*arguments):
        return run_here("tools/inspect_dataset.py", *arguments, "--output", tmp_path / "out")

    assert_user_error(run("nowhere"), "'nowhere' is not registered")
    assert_user_error(run("mine", *register, "--iterations", "0"), "--iterations is 0")
    assert_user_error(run("MODEL.WEIGHTS", "x.pth", *register), "at least one dataset")
    assert_user_error(run("mine", "INPUT.MIN_SIZE", "3", *register), "there is no key INPUT.MIN_S")
    assert_user_error(
        run("mine", *register, "MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.WEIGHTS", "x.pth"),
        "there is no file x.pth",
    )
    weights = tmp_path / "empty.pth"
    torch.save({"model": {}}, weights)
    retinanet = ("--config-file", "configs/Base-RetinaNet.yaml", "MODEL.WEIGHTS", weights)
    assert_user_error(
        run("mine", *register, *retinanet),
        "does not sample proposals",
    )
    content = json.loads(tiny_coco.read_text())
    for changes, message in (
        ({"annotations": []}, "there are no boxes in mine"),
        ({"annotations": [{**content["annotations"][0], "image_id": 99}]}, "belong to no image"),
    ):
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps({**content, **changes}))
        result = run("mine", "--register", "mine", changed, tiny_coco.parent / "images")
        assert_user_error(result, message)
    assert not list((tmp_path / "out").glob("*.html"))


def test_a_dataset_without_its_images(tiny_coco, tmp_path, run_here):
    """What does not need them is shown all the same."""
    (tmp_path / "empty").mkdir()
    register = ["--register", "mine", tiny_coco, tmp_path / "empty"]
    result = run_here("tools/inspect_dataset.py", "mine", *register, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "mine: 6 images, 18 boxes" in result.stdout
    assert "cannot read" in (tmp_path / "out" / "inspect.html").read_text()


# In a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

# The page in a frame of the width of a phone, and a script that says what the browser made of it.
FRAME = """<!DOCTYPE html><iframe id="frame" width="{width}" height="800"></iframe><script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images];
  document.title = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    images: images.length, broken: images.filter(image => !image.naturalWidth).length,
    bars: page.querySelectorAll(".bar i").length, scripts: page.scripts.length,
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    color: frame.contentWindow.getComputedStyle(page.body).color,
  }});
}};
frame.srcdoc = {page};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_in_a_browser(found, tmp_path, scheme, width):
    write_page(found, crop_groups(found), "base.yaml", str(tmp_path / "page.html"))
    page = json.dumps((tmp_path / "page.html").read_text()).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=page))
    assert BROWSER is not None
    result = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"),
            *(["--force-dark-mode"] if scheme == "dark" else []),
            *("--dump-dom", (tmp_path / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(re.search(r"<title>(.*?)</title>", result.stdout)[1])
    assert seen["overflow"] == 0 and seen["broken"] == 0 and seen["scripts"] == 0
    assert seen["images"] >= 20
    assert seen["bars"] == sum(len(v) for c in dataset_charts(found) for _, v, _ in c.rows)
    light, dark = (
        [int(n) for n in re.findall(r"\d+", seen[key])] for key in ("background", "color")
    )
    assert (min(light) > max(dark)) == (scheme == "light")
