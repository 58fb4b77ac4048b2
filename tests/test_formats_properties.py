"""Random datasets in every format are read as they were written; random damage ends in a result or
in one line; a split is the same everywhere, with every class in both parts.

``HYPOTHESIS_EXAMPLES`` sets the number, of damage in all formats together; `make soak` takes many
more.
"""

import csv
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_util

from balanced_d2 import load_config
from balanced_d2.data.adapted import adapt
from balanced_d2.data.checks.for_model import check_datasets, load
from balanced_d2.data.classes import set_num_classes
from balanced_d2.data.datasets.register import register_source
from balanced_d2.data.datasets.split import choose_val
from balanced_d2.data.loader import TrainLoader
from balanced_d2.engine.start import complete_gray_range
from balanced_d2.evaluation.evaluators import build_evaluator
from balanced_d2.utils.errors import StopTraining, UserError

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "100"))
examples = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

# What XML and YAML can hold, without what programs strip.
characters = st.characters(exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp"))
class_names = st.text(characters, min_size=1, max_size=8).map(lambda s: " ".join(s.split()))
class_names = class_names.filter(lambda s: s and s.lower() not in ("nan", "null"))
file_names = st.text("abcäß猫 -_.()1", min_size=1, max_size=8).filter(
    lambda s: s == s.strip() and s.strip(". ") and not s.startswith((".", "-")) and s[-1] != "."
)
fractions = st.integers(0, 64).map(lambda i: i / 64)


@st.composite
def datasets(draw):
    """{split: {stem: (size, [(class, x0, y0, x1, y1 in fractions)])}}, and the classes."""
    classes = draw(st.lists(class_names, min_size=1, max_size=4, unique=True))
    splits = draw(st.sampled_from([("train",), ("train", "val"), ("train", "val", "test")]))
    corners = st.lists(fractions, min_size=2, max_size=2, unique=True).map(sorted)
    stems = draw(
        st.lists(
            file_names,
            min_size=len(splits),
            max_size=6,
            unique_by=lambda s: s.lower(),
        )
    )
    found = {split: {} for split in splits}
    for i, stem in enumerate(stems):
        size = draw(st.tuples(st.integers(8, 60), st.integers(8, 60)))
        boxes = [
            (draw(st.sampled_from(classes)), x0, y0, x1, y1)
            for (x0, x1), (y0, y1) in draw(st.lists(st.tuples(corners, corners), max_size=4))
        ]
        found[splits[i % len(splits)]][stem] = (size, boxes)
    # Formats do not know that there is a split in which nothing is labelled, and boxes that all end
    # within the first pixel are taken for fractions.
    for images in found.values():
        stem, (size, boxes) = next(iter(images.items()))
        images[stem] = (size, [*boxes, (classes[0], 0.25, 0.25, 0.5, 0.75)])
    return found, classes


def write_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size).save(path, "PNG")


def in_pixels(size, box):
    return [value * size[i % 2] for i, value in enumerate(box)]


def write_yolo(folder, splits, classes, in_lists=False):
    for split, images in splits.items():
        for stem, (size, boxes) in images.items():
            write_image(folder / split / "images" / f"{stem}.png", size)
            lines = [
                f"{classes.index(label)} {(x0 + x1) / 2} {(y0 + y1) / 2} {x1 - x0} {y1 - y0}"
                for label, x0, y0, x1, y1 in boxes
            ]
            (folder / split / "labels").mkdir(exist_ok=True)
            (folder / split / "labels" / f"{stem}.txt").write_text("\n".join(lines))
        if in_lists:
            lines = [f"./{split}/images/{stem}.png" for stem in images]
            (folder / f"{split}.txt").write_text("\n".join(lines))
    paths = {split: f"{split}.txt" if in_lists else f"../{split}/images" for split in splits}
    (folder / "data.yaml").write_text(yaml.safe_dump({**paths, "names": classes}))


def write_yolo_lists(folder, splits, classes):
    write_yolo(folder, splits, classes, in_lists=True)


def write_yolo_folders(folder, splits, classes):
    write_yolo(folder, splits, classes)
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("\n".join(classes))


def voc(name, size, boxes):
    objects = []
    for label, *box in boxes:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), in_pixels(size, box))
        box_text = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
        objects.append(f"<object><name>{escape(label)}</name><bndbox>{box_text}</bndbox></object>")
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    text = f"<filename>{escape(name)}</filename>{sides}{''.join(objects)}"
    return f"<annotation>{text}</annotation>"


def write_voc(folder, splits, classes):
    for split, images in splits.items():
        for stem, (size, boxes) in images.items():
            write_image(folder / split / f"{stem}.png", size)
            (folder / split / f"{stem}.xml").write_text(voc(f"{stem}.png", size, boxes))


def write_voc_lists(folder, splits, classes):
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, images in splits.items():
        for stem, (size, boxes) in images.items():
            write_image(folder / "JPEGImages" / f"{stem}.png", size)
            (folder / "Annotations" / f"{stem}.xml").write_text(voc("?", size, boxes))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(images))


def table(rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def write_csv(folder, splits, classes):
    for split, images in splits.items():
        rows = [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"]]
        for stem, (size, boxes) in images.items():
            write_image(folder / split / f"{stem}.png", size)
            rows += [
                (f"{stem}.png", *size, label, *in_pixels(size, box)) for label, *box in boxes
            ] or [(f"{stem}.png", *size, "", "", "", "", "")]
        (folder / split / "_annotations.csv").write_text(table(rows))


def write_google(folder, splits, classes):
    names = {"train": "TRAIN", "val": "VALIDATION", "test": "TEST"}
    rows = []
    for split, images in splits.items():
        for stem, (size, boxes) in images.items():
            write_image(folder / "images" / f"{stem}.png", size)
            start = (names[split], f"gs://bucket/images/{stem}.png")
            rows += [
                (*start, label, x0, y0, "", "", x1, y1, "", "") for label, x0, y0, x1, y1 in boxes
            ] or [(*start, *[""] * 9)]
    (folder / "export.csv").write_text(table(rows))


def write_coco(folder, splits, classes):
    for split, images in splits.items():
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
        for stem, (size, boxes) in images.items():
            write_image(folder / split / f"{stem}.png", size)
            image = {"id": len(content["images"]), "file_name": f"{stem}.png"}
            content["images"].append({**image, "width": size[0], "height": size[1]})
            for label, *box in boxes:
                x0, y0, x1, y1 = in_pixels(size, box)
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image["id"],
                        "category_id": classes.index(label) + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": 0,
                    }
                )
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def write_coco_masks(folder, splits, classes):
    """With polygons, masks in both forms and a crowd."""
    write_coco(folder, splits, classes)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            x, y, w, h = annotation["bbox"]
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            (packed,) = mask_util.frPyObjects(polygon, *sizes[annotation["image_id"]])
            mask = mask_util.decode(packed).ravel(order="F")
            edges = np.flatnonzero(np.diff(mask)) + 1
            counts = np.diff([0, *edges, len(mask)]).tolist()
            annotation["segmentation"] = (
                polygon,
                {**packed, "counts": packed["counts"].decode()},
                {**packed, "counts": counts},
            )[number % 3]
        content["annotations"].append({**annotation, "id": 99, "iscrowd": 1})
        file.write_text(json.dumps(content))


WRITERS = {
    "yolo": write_yolo,
    "yolo lists": write_yolo_lists,
    "yolo folders": write_yolo_folders,
    "voc": write_voc,
    "voc lists": write_voc_lists,
    "csv": write_csv,
    "google": write_google,
    "coco": write_coco,
}
formats = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


# Many examples are for all formats together.
round_trips = settings(examples, max_examples=max(100, EXAMPLES // len(WRITERS)))
corruptions = settings(examples, max_examples=max(30, -(-EXAMPLES // (len(WRITERS) + 1))))


class Folder:
    """A folder, and names of datasets, for one example."""

    def __enter__(self):
        self.before = set(DatasetCatalog)
        self.path = Path(tempfile.mkdtemp()).resolve()
        return self.path

    def __exit__(self, *error):
        shutil.rmtree(self.path)
        for name in set(DatasetCatalog) - self.before:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


@formats
@round_trips
@given(dataset=datasets())
def test_what_was_written_is_read(write, dataset):
    splits, classes = dataset
    boxes = [box for images in splits.values() for _, found in images.values() for box in found]
    with Folder() as folder:
        write(folder, splits, classes)
        if write is write_csv and all(
            max(map(abs, in_pixels(size, box))) <= 1
            for images in splits.values()
            for size, found in images.values()
            for _, *box in found
        ):
            return  # refused: they may be fractions
        names = register_source("random", str(folder))
        assert names == [f"random_{split}" for split in splits]
        found = {}
        for split in splits:
            records = load(f"random_{split}")
            read_classes = MetadataCatalog.get(f"random_{split}").thing_classes
            found[split] = {
                Path(r["file_name"]).stem: (
                    (r["width"], r["height"]),
                    [
                        (read_classes[a["category_id"]], *(round(v, 2) for v in a["bbox"]))
                        for a in r["annotations"]
                    ],
                )
                for r in records
            }
            if write in (write_yolo, write_yolo_lists, write_yolo_folders, write_coco):
                assert read_classes == classes
            else:
                used = {label for label, *_ in boxes}
                are_numbers = all(label.isdecimal() for label in used)
                assert read_classes == sorted(used, key=lambda x: (int(x) if are_numbers else 0, x))
    for split, images in splits.items():
        assert found[split].keys() == images.keys()
        for stem, (size, expected) in images.items():
            assert found[split][stem][0] == size
            read = found[split][stem][1]
            assert [label for label, *_ in read] == [label for label, *_ in expected]
            for (_, *box), (_, *corners) in zip(read, expected):
                x0, y0, x1, y1 = in_pixels(size, corners)
                assert box == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.01)


JUNK = [
    *(b"", b"-1", b"0", b"2", b"1e999", b"nan", b"1_0", b"9" * 400, b"1,5", b"0x10", b"true"),
    *(b"../..", b"/", b".", b"C:\\x", b"null", b"[[", b"{}", b"'", b'"', b"\0", b"\xff"),
    *(b"&x;", b"<a>", "猫".encode(), "\u202e".encode(), b"train", b"*a", b"!!binary", b"a.png"),
]
TOKEN = re.compile(rb"[^\s,;<>\"'=:{}\[\]/]+")


def damage(content: bytes, data) -> bytes:
    """Bytes or words that are lost, doubled, exchanged or something else."""
    kinds = ["flip", "insert", "lines", "swap", "cut", "word", "word", "word"]
    kind = data.draw(st.sampled_from(kinds))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    if not content:
        return bytes(rng.randrange(256) for _ in range(9))
    place = rng.randrange(len(content))
    if kind == "flip":
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if kind == "insert":
        more = bytes([rng.randrange(256)]) * rng.choice((1, 5, 3000))
        return content[:place] + more + content[place:]
    if kind == "cut":
        return rng.choice((content[:place], content[place:]))
    if kind == "lines":
        lines = content.splitlines(keepends=True)
        number = rng.randrange(len(lines))
        lines[number : number + 1] = lines[number : number + 1] * rng.choice((0, 2))
        return b"".join(lines)
    words = list(TOKEN.finditer(content))
    if not words:
        return b""
    first = rng.choice(words)
    other = rng.choice(words)[0] if kind == "swap" else rng.choice(JUNK)
    return content[: first.start()] + other + content[first.end() :]


@contextmanager
def quiet():
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def time_limit(seconds: int):
    """What takes longer hangs, and fails."""

    def stop(*_):
        raise AssertionError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def begin(path: Path, masks: bool):
    """What a training of a dataset does until its first iteration, and one evaluation."""
    names = register_source("damaged", str(path))
    sets = tuple(name for name in names if not name.endswith("_test"))
    cfg = load_config("", [])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = sets[:1], sets[-1:]
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = masks, "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (32,), 32
    data = check_datasets(cfg, number_follows=True)
    complete_gray_range(cfg, data, train=True)
    for name, change in data.changes.items():
        adapt(name, change, data.classes)
    set_num_classes(cfg, len(data.classes))
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = 1, 2
    batch = next(iter(TrainLoader(cfg)))
    for sample in batch:
        assert sample["instances"].gt_boxes.tensor.isfinite().all()
        assert sample["instances"].gt_classes.max() < len(data.classes)
    (tested,) = cfg.DATASETS.TEST
    evaluator = build_evaluator(tested, str(path / "evaluation"))
    evaluator.reset()
    for record in load(tested):
        found = Instances((int(record["height"]), int(record["width"])))
        found.pred_boxes = Boxes(torch.tensor([[10.0, 7.5, 20, 22.5]]))
        found.pred_classes, found.scores = torch.tensor([0]), torch.ones(1)
        if masks:
            found.pred_masks = torch.ones(1, *found.image_size, dtype=torch.bool)
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()


@pytest.mark.parametrize("write", [*WRITERS.values(), write_coco_masks], ids=[*WRITERS, "masks"])
@corruptions
@given(data=st.data())
def test_damage_ends_in_a_result_or_one_line(write, data):
    """From the files to the first batch and an evaluation."""
    boxes = [("dog", 0.25, 0.25, 0.5, 0.75), ("cat", 0.5, 0.25, 0.75, 0.75)]
    splits = {
        s: {f"{s}{i}": ((40, 30), boxes[: i + 1]) for i in range(2)} for s in ("train", "val")
    }
    with Folder() as folder, quiet(), time_limit(60):
        write(folder, splits, ["dog", "cat"])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        texts = [path for path in files if path.suffix != ".png"]
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from([*texts, *texts, *files]))
            path.write_bytes(damage(path.read_bytes(), data))
        try:
            results = begin(folder, masks=write is write_coco_masks)
        except (UserError, StopTraining) as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 5000
            return
        assert all(value <= 100.001 for value in results["bbox"].values() if value == value)


@examples
@given(
    st.dictionaries(
        st.text(max_size=5), st.frozensets(st.sampled_from("abcdefg"), max_size=3), min_size=2
    ),
    st.floats(0.01, 0.99),
)
def test_split(labels, fraction):
    val = choose_val(labels, fraction)
    shuffled = dict(sorted(labels.items(), key=lambda item: item[0][::-1]))
    assert choose_val(shuffled, fraction) == val
    assert 0 < len(val) < len(labels)
    counts = {c: [name in val for name, own in labels.items() if c in own] for c in "abcdefg"}
    one_sided = [c for c, sides in counts.items() if len(sides) > 1 and len(set(sides)) == 1]
    if all(len(own) <= 1 for own in labels.values()):
        for sides in counts.values():
            wanted = min(max(1, round(fraction * len(sides))), len(sides) - 1)
            assert sum(sides) == max(0, wanted) or len(labels) == len(
                set.union(set(), *labels.values())
            )
        assert not one_sided
    elif one_sided and len(labels) <= 10:
        # Moving one image would put at least one other class into a single part.
        for name in labels:
            moved = val ^ {name}
            sides = {c: {n in moved for n, own in labels.items() if c in own} for c in counts}
            now = [c for c in counts if len(counts[c]) > 1 and len(sides[c]) == 1]
            assert len(now) >= len(one_sided) or len(moved) in (0, len(labels))


def test_split_is_the_same_on_every_machine():
    labels = {f"images/{i}.jpg": frozenset("a" if i % 10 else "ab") for i in range(40)}
    assert sorted(choose_val(labels, 0.2)) == [
        f"images/{i}.jpg" for i in (0, 1, 17, 18, 28, 33, 36, 39)
    ]


def test_split_keeps_the_share():
    rng = random.Random(0)
    weights = {"a": 0.9, "b": 0.3, "c": 0.1, "d": 0.01}
    labels = {
        str(i): frozenset(c for c, share in weights.items() if rng.random() < share)
        for i in range(1000)
    }
    val = choose_val(labels, 0.2)
    assert abs(len(val) - 200) <= 20
    for c in weights:
        held = [name in val for name, own in labels.items() if c in own]
        assert abs(sum(held) / len(held) - 0.2) < 0.06
