"""COCO files as annotation tools write them, as a table: what is read, and what is refused."""

import copy
import json
import logging
import os
import unicodedata

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from balanced_d2.data import load_coco
from balanced_d2.data.checks.coco_file import check_coco
from balanced_d2.data.checks.records import left_out_findings, report
from balanced_d2.data.datasets.coco import register_coco
from balanced_d2.data.datasets.image_paths import find_images
from balanced_d2.evaluation.evaluators import build_evaluator
from balanced_d2.utils.errors import UserError

NAME = "as_it_comes"
WIDTH, HEIGHT = 50, 40
BOX = [5, 10, 20, 12]
POLYGON = [5, 10, 25, 10, 25, 22, 5, 22]
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", 100))


@pytest.fixture(autouse=True)
def unregister():
    yield
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def good():
    """Two images, three annotations, two classes."""
    return {
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in (1, 2)
        ],
        "annotations": [
            {
                "id": n,
                "image_id": 1 + n % 2,
                "category_id": 1 + n % 2,
                "bbox": list(BOX),
                "area": 240,
                "iscrowd": 0,
                "segmentation": [list(POLYGON)],
            }
            for n in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def read(folder, content, masks=False):
    """Do what programs do at the start; return the records, the names of the classes, and the
    findings."""
    json_file = folder / "a.json"
    json_file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    findings = check_coco(NAME, str(json_file), evaluated=True, masks=masks)
    report(NAME, [finding for finding in findings if finding.refused])
    records = load_coco(NAME, str(json_file), str(folder))
    findings += left_out_findings(records, filter_empty=True)
    return records, MetadataCatalog.get(NAME).thing_classes, [str(f) for f in findings]


def each(part, *indices, **fields):
    """A change: fields of the given items of a part, or of all; ``...`` removes a field."""

    def change(content):
        for index, item in enumerate(content[part]):
            if not indices or index in indices:
                item.update(copy.deepcopy(fields))
                for key in [key for key, value in fields.items() if value is ...]:
                    del item[key]

    return change


def annotations(*indices, **fields):
    return each("annotations", *indices, **fields)


def several(*changes):
    def change(content):
        for one in changes:
            one(content)

    return change


def rle(size=(HEIGHT, WIDTH), cut=0, text=True):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    x, y, w, h = BOX
    mask[y : y + h, x : x + w] = 1
    encoded = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    if not text:
        flat = mask.ravel(order="F")
        starts = np.flatnonzero(np.diff(flat)) + 1
        encoded = np.diff([0, *starts, len(flat)]).tolist()
    return {"size": list(size), "counts": encoded[: len(encoded) - cut]}


def roboflow(*others):
    names = ({"id": 0, "name": "pets", "supercategory": "none"},)
    names += tuple({"id": n, "name": name, "supercategory": "pets"} for n, name in others)
    return lambda content: content.update(categories=list(names))


def unchanged(records, classes):
    """The three annotations are there, with their boxes and classes."""
    found = [a for record in records for a in record["annotations"]]
    assert sorted(a["category_id"] for a in found) == [0, 1, 1]
    assert all(a["bbox"] == BOX and a["iscrowd"] == 0 for a in found)
    assert [len(record["annotations"]) for record in records] == [1, 2]
    assert len(classes) == 2


def with_masks(records, classes):
    unchanged(records, classes)
    for record in records:
        for annotation in record["annotations"]:
            mask = annotation["segmentation"]
            if isinstance(mask, list):
                mask = mask_util.merge(mask_util.frPyObjects(mask, HEIGHT, WIDTH))
            assert mask_util.area(mask) == 240 and mask_util.toBbox(mask).tolist() == BOX


def without_masks(records, classes):
    unchanged(records, classes)
    assert not any("segmentation" in a for record in records for a in record["annotations"])


# A change to a good file, what holds for the result, and what is reported.
READ = {
    "as it is": (lambda content: None, with_masks, []),
    "annotation ids from 0": (
        several(annotations(0, id=0), annotations(1, id=1), annotations(2, id=2)),
        with_masks,
        [],
    ),
    "annotation ids missing": (annotations(id=...), unchanged, ["numbered 3 annotation(s)"]),
    "annotation ids null": (annotations(1, id=None), unchanged, ["number 2 in the file (id None)"]),
    "annotation ids double": (annotations(0, 1, id=7), unchanged, ["numbered 2 annotation(s)"]),
    "annotation ids as text": (
        several(*(annotations(n, id=f"a-{n}") for n in range(3))),
        unchanged,
        [],
    ),
    "category ids as text": (
        several(*(each("categories", n, id=str(n + 1)) for n in (0, 1))),
        unchanged,
        [],
    ),
    "category ids as text in annotations": (
        several(annotations(0, 2, category_id="2"), annotations(1, category_id="1")),
        unchanged,
        [],
    ),
    "category ids as floats": (
        several(*(each("categories", n, id=n + 1.0) for n in (0, 1))),
        unchanged,
        [],
    ),
    "categories from 0": (
        several(
            *(each("categories", n, id=n) for n in (0, 1)),
            annotations(0, 2, category_id=1),
            annotations(1, category_id=0),
        ),
        unchanged,
        [],
    ),
    "image ids as text": (
        several(*(each("images", n, id=str(n + 1)) for n in (0, 1))),
        unchanged,
        [],
    ),
    "image ids as text in annotations": (
        several(annotations(0, 2, image_id="2"), annotations(1, image_id="1")),
        unchanged,
        [],
    ),
    "image ids of letters": (
        several(
            *(each("images", n, id=f"image {n}") for n in (0, 1)),
            annotations(0, 2, image_id="image 1"),
            annotations(1, image_id="image 0"),
        ),
        unchanged,
        [],
    ),
    "sizes as text": (each("images", width=str(WIDTH), height=f"{HEIGHT}.0"), unchanged, []),
    "boxes as text": (annotations(bbox=[str(value) for value in BOX]), unchanged, []),
    "no area": (annotations(area=...), with_masks, ["computed 3 area(s)"]),
    "area null": (annotations(area=None), with_masks, ["computed 3 area(s)"]),
    "area as text": (annotations(area="240.0"), with_masks, []),
    "area below 0": (annotations(0, area=-1), with_masks, ["computed 1 area(s)"]),
    "no iscrowd": (annotations(iscrowd=...), with_masks, []),
    "iscrowd null": (annotations(iscrowd=None), with_masks, []),
    "iscrowd as text": (annotations(0, 1, iscrowd="0"), with_masks, []),
    "iscrowd false": (
        several(annotations(0, iscrowd=False), annotations(1, iscrowd="false")),
        with_masks,
        [],
    ),
    "iscrowd as a float": (annotations(iscrowd=0.0), with_masks, []),
    "ignore null": (annotations(ignore=None), with_masks, []),
    "no segmentation": (annotations(segmentation=...), without_masks, []),
    "segmentation null": (annotations(segmentation=None), without_masks, []),
    "no polygon": (annotations(segmentation=[]), without_masks, []),
    "an empty polygon": (annotations(segmentation=[[]]), without_masks, []),
    "a flat polygon, as VIA's": (annotations(segmentation=POLYGON), with_masks, []),
    "pairs of points, as LabelMe's": (
        annotations(segmentation=np.reshape(POLYGON, (-1, 2)).tolist()),
        with_masks,
        [],
    ),
    "polygons of pairs": (
        annotations(segmentation=[np.reshape(POLYGON, (-1, 2)).tolist()]),
        with_masks,
        [],
    ),
    "a rectangle as two points": (
        annotations(segmentation=[[5, 10, 25, 22]]),
        with_masks,
        ["read as rectangles 3"],
    ),
    "a rectangle as two points, upwards": (
        annotations(0, segmentation=[[25, 22, 5, 10]]),
        with_masks,
        ["read as rectangles 1"],
    ),
    "two other points": (
        annotations(0, segmentation=[[1, 2, 3, 4]]),
        unchanged,
        ["ignored 1", "polygon of at least three points: annotation 1 (image 2)"],
    ),
    "large image ids": (
        several(
            *(each("images", n, id=2**60 + n) for n in (0, 1)),
            annotations(0, 2, image_id=2**60 + 1),
            annotations(1, image_id=2**60),
        ),
        unchanged,
        [],
    ),
    "an empty polygon beside one": (
        annotations(segmentation=[[], POLYGON, [1, 2]]),
        with_masks,
        [],
    ),
    "text for a mask": (annotations(0, segmentation="mask.png"), unchanged, ["ignored 1"]),
    "RLE": (annotations(segmentation=rle()), with_masks, []),
    "RLE of numbers": (annotations(segmentation=rle(text=False)), with_masks, []),
    "RLE that does not add up": (
        annotations(1, segmentation=rle(cut=1)),
        unchanged,
        ["ignored 1", "does not add up to its image's size: annotation 2 (image 1)"],
    ),
    "no box, but a mask": (annotations(0, bbox=...), with_masks, ["computed 1 bbox(es)"]),
    "box null, but RLE": (
        annotations(0, bbox=None, segmentation=rle()),
        with_masks,
        ["computed 1 bbox(es)"],
    ),
    "keypoints null": (annotations(keypoints=None), with_masks, []),
    "Roboflow's super-category": (
        roboflow((1, "cat"), (2, "dog")),
        with_masks,
        ["left out 1 category that only names the group", "category 0 (pets)"],
    ),
    "names of numbers": (each("categories", 0, name=7), with_masks, []),
    "one image twice": (
        each("images", 1, file_name="1.jpg"),
        with_masks,
        ["1 file(s) that belong to more than one image: 1.jpg (2 images)"],
    ),
    "fields of other formats": (
        lambda content: content.update(info=None, licenses=[None], videos="none"),
        with_masks,
        [],
    ),
}


@pytest.mark.parametrize("change, holds, messages", READ.values(), ids=READ.keys())
def test_what_is_read(tmp_path, change, holds, messages):
    content = good()
    change(content)
    records, classes, found = read(tmp_path, content)
    holds(records, classes)
    for message in messages:
        assert any(message in text for text in found), found
    if not messages:
        assert not found


CORNERS = [[30, 20, 48, 38], [5, 5, 20, 30], [26, 22, 49, 39]]
FRACTIONS = [[0.1, 0.2, 0.5, 0.4], [0.5, 0.5, 0.25, 0.25], [0.0, 0.9, 0.5, 0.1]]


def boxes(values):
    return several(*(annotations(n, bbox=value) for n, value in enumerate(values)))


# A change to a good file, whether masks are used, and what the refusal says.
REFUSED = {
    "corners": (
        boxes(CORNERS),
        False,
        ["annotation 1 (image 2): [30, 20, 48, 38]", "x1, y1, x2, y2"],
    ),
    "fractions": (
        boxes(FRACTIONS),
        False,
        ["3 annotation(s)", "[0.1, 0.2, 0.5, 0.4]", "in pixels"],
    ),
    "iscrowd in words": (
        annotations(1, iscrowd="maybe"),
        False,
        ["annotation 2 (image 1) (iscrowd 'maybe')"],
    ),
    "iscrowd 2": (annotations(1, iscrowd=2), False, ["(iscrowd 2)"]),
    "ignore": (annotations(1, ignore=1), False, ['marked "ignore"']),
    "mask of two other points": (
        annotations(0, segmentation=[[1, 2, 3, 4]]),
        True,
        ["without a polygon of at least three points: annotation 1"],
    ),
    "mask in words": (
        annotations(0, segmentation="mask.png"),
        True,
        ["neither a list of polygons"],
    ),
    "mask with NaN": (
        annotations(0, segmentation=[[float("nan"), *POLYGON[1:]]]),
        True,
        ["neither a list of polygons"],
    ),
    "polygon far out": (
        annotations(0, segmentation=[[0, 0, 1e300, 0, 1e300, 1]]),
        True,
        ["a polygon that reaches far beyond the image"],
    ),
    "RLE cut off": (
        annotations(0, segmentation=rle(cut=1)),
        True,
        ["RLE mask that does not add up"],
    ),
    "RLE of numbers cut off": (
        annotations(0, segmentation=rle(cut=1, text=False)),
        True,
        ["RLE mask that does not add up"],
    ),
    "RLE of the other orientation": (
        annotations(0, segmentation=rle(size=(WIDTH, HEIGHT))),
        True,
        ["RLE mask that does not add up"],
    ),
    "RLE below 0": (
        annotations(0, segmentation={"size": [HEIGHT, WIDTH], "counts": [-5, 2005]}),
        True,
        ["RLE mask that does not add up"],
    ),
    "RLE of other letters": (
        annotations(0, segmentation={"size": [HEIGHT, WIDTH], "counts": "äöü~"}),
        True,
        ["RLE mask that does not add up"],
    ),
    "two classes of one name": (
        each("categories", name="cat"),
        False,
        ["'cat' (categories 1, 2)", "rename one"],
    ),
    "two classes of one name in two normal forms": (
        several(
            each("categories", 0, name=unicodedata.normalize("NFC", "Bär")),
            each("categories", 1, name=unicodedata.normalize("NFD", "Bär")),
        ),
        False,
        ["more than one category"],
    ),
    "a class without a name": (each("categories", 1, name=" "), False, ["category 2"]),
    "no width": (each("images", 1, width=None), False, ["image 2 (None x 40)"]),
}


@pytest.mark.parametrize("change, masks, parts", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(tmp_path, change, masks, parts):
    content = good()
    change(content)
    with pytest.raises(UserError) as error:
        read(tmp_path, content, masks)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings(tmp_path, encoding):
    content = good()
    content["categories"][0]["name"] = "猫 $x_1$ 🐈"
    records, classes, found = read(
        tmp_path, json.dumps(content, ensure_ascii=False).encode(encoding)
    )
    with_masks(records, classes)
    assert classes[0] == "猫 $x_1$ 🐈" and not found


def test_another_encoding_is_refused(tmp_path):
    content = good()
    content["categories"][0]["name"] = "Bär"
    with pytest.raises(UserError, match="not in UTF-8.*save it as UTF-8"):
        read(tmp_path, json.dumps(content, ensure_ascii=False).encode("cp1252"))


def test_a_super_category_that_is_a_class_stays(tmp_path):
    content = good()
    roboflow((1, "cat"), (2, "dog"))(content)
    content["annotations"][0]["category_id"] = 0
    assert read(tmp_path, content)[1] == ["pets", "cat", "dog"]
    content = good()
    roboflow((1, "cat"), (2, "dog"))(content)
    content["categories"][2]["supercategory"] = "none"
    MetadataCatalog.pop(NAME)
    assert read(tmp_path, content)[1] == ["pets", "cat", "dog"]


def test_crowds_and_empty_images_are_counted(tmp_path):
    content = good()
    annotations(1, iscrowd="1")(content)
    records, _, found = read(tmp_path, content)
    assert [a["iscrowd"] for record in records for a in record["annotations"]] == [1, 0, 0]
    assert any("left out 1 annotation(s) that are marked iscrowd" in text for text in found)
    assert any("left out 1 image(s) without objects" in text for text in found)


def test_few_boxes_in_the_first_pixel_are_kept(tmp_path):
    """Slivers at the corner of a tile; a file of fractions has many."""
    content = good()
    content["annotations"] += [
        {**content["annotations"][0], "id": n, "image_id": 1} for n in range(4, 30)
    ]
    content["annotations"][0]["bbox"] = FRACTIONS[0]
    _, _, found = read(tmp_path, content)
    assert any(text.startswith("kept 1 annotation(s) whose box lies within") for text in found)


def test_loads_what_detectron2_loads(tiny_coco):
    ours = load_coco(NAME, str(tiny_coco), str(tiny_coco.parent / "images"))
    images = str(tiny_coco.parent / "images")
    theirs = load_coco_json(str(tiny_coco), images, "theirs", extra_annotation_keys=["id"])
    assert ours == theirs
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get(NAME).get(key) == MetadataCatalog.get("theirs").get(key)
    MetadataCatalog.pop("theirs")


# Evaluation


def perfect_results(folder, content, masks=False):
    """AP of detections that are the ground truth."""
    json_file = folder / "a.json"
    json_file.write_text(json.dumps(content))
    register_coco(NAME, str(json_file), str(folder))
    evaluator = build_evaluator(NAME, str(folder / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        detections = Instances((HEIGHT, WIDTH))
        found = [a for a in record["annotations"] if not a["iscrowd"]]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]
        detections.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float).reshape(-1, 4))
        detections.pred_classes = torch.tensor([a["category_id"] for a in found])
        detections.scores = torch.ones(len(found))
        if masks:
            filled = torch.zeros(len(found), HEIGHT, WIDTH, dtype=torch.bool)
            for mask, (x, y, w, h) in zip(filled, (a["bbox"] for a in found)):
                mask[y : y + h, x : x + w] = True
            detections.pred_masks = filled
        evaluator.process([record], [{"instances": detections}])
    return evaluator.evaluate()


EVALUATED = (
    "annotation ids from 0",
    "annotation ids missing",
    "annotation ids double",
    "annotation ids as text",
    "category ids as text",
    "image ids as text",
    "image ids of letters",
    "large image ids",
    "no area",
    "area as text",
    "area below 0",
    "iscrowd null",
    "iscrowd as text",
    "Roboflow's super-category",
    "a rectangle as two points",
)


@pytest.mark.parametrize("case", EVALUATED)
def test_perfect_detections_have_an_ap_of_100(tmp_path, case):
    content = good()
    content["annotations"][2].update(
        bbox=[28, 10, 20, 12], segmentation=[[28, 10, 48, 10, 48, 22, 28, 22]]
    )
    if case != "a rectangle as two points":
        READ[case][0](content)
    results = perfect_results(tmp_path, content, masks=True)
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100), results
        assert results[task]["APs"] == pytest.approx(100)


def test_a_crowd_without_a_mask_can_be_evaluated(tmp_path):
    content = good()
    annotations(2, iscrowd=1, segmentation=..., bbox=[28, 10, 20, 12])(content)
    results = perfect_results(tmp_path, content, masks=True)
    assert results["segm"]["AP"] == pytest.approx(100)


# Files


@pytest.mark.parametrize(
    "name, file",
    [
        ("1.jpg", "1.jpg"),
        ("sub\\1.jpg", "sub/1.jpg"),
        ("sub//./1.jpg", "sub/1.jpg"),
        (r"C:\Users\me\tool\sub\1.jpg", "sub/1.jpg"),
        (r"..\..\tool\media\upload\4\1.jpg", "1.jpg"),
        ("/home/other/data/sub/1.jpg", "sub/1.jpg"),
        ("1.JPG", "1.jpg"),
        ("1.jpg", "1.JPG"),
        ("Sub/1.jpg", "sub/1.jpg"),
        (unicodedata.normalize("NFC", "é ü.jpg"), unicodedata.normalize("NFD", "é ü.jpg")),
        (unicodedata.normalize("NFD", "が.jpg"), unicodedata.normalize("NFC", "が.jpg")),
        ("my%20image.jpg", "my image.jpg"),
        ("100%25.jpg", "100%25.jpg"),
        ("a[1] $x$.jpg", "a[1] $x$.jpg"),
        ("images/1.jpg", "1.jpg"),
    ],
)
def test_names_of_files(tmp_path, name, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    found = find_images(str(tmp_path), [name])
    assert os.path.samefile(found.paths[0], tmp_path / file) and not found.missing
    assert found.renamed == ([] if os.path.exists(tmp_path / name) else [0])


def test_an_absolute_path_is_that_file(tmp_path):
    for folder in ("images", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").touch()
    name = str(tmp_path / "elsewhere" / "1.jpg")
    assert find_images(str(tmp_path / "images"), [name]).paths == [name]


@pytest.mark.parametrize(
    "files, names",
    [
        (["A.jpg", "a.JPG"], ["a.jpg"]),  # which of them?
        (["1.jpg"], ["cats/1.jpg", "dogs/1.jpg"]),  # at most one is there
        (["1.jpg"], ["1.jpg", "dogs/1.jpg"]),
        (["sub/1.jpg"], ["1.jpg"]),  # another file, for all that is known
        ([], ["1.jpg"]),
        ([], ["a\x00.jpg"]),
    ],
)
def test_names_that_could_be_several_files_are_missing(tmp_path, files, names):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = find_images(str(tmp_path), names)
    absent = [n for n, name in enumerate(names) if name not in files]
    assert found.missing == absent and not found.renamed
    assert found.paths == [os.path.join(tmp_path, name) for name in names]


# Corruptions


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["0", "1", "nan", "1e999", "-0", "٣", "\ud800", 10**400, -(2**63), 1e308]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def rich():
    """A file with every kind of field that is read."""
    content = good()
    annotations(0, segmentation=rle())(content)
    annotations(1, segmentation=rle(text=False), keypoints=[6, 11, 2, 7, 12, 1])(content)
    each("categories", keypoints=["left", "right"], supercategory="none")(content)
    return content


def places(value, path=()):
    """Every place in a JSON value: the keys that lead to it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, (dict, list)) else ():
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
@given(data=st.data(), masks=st.booleans())
def test_corrupted_files_end_in_a_result_or_a_user_error(tmp_path, data, masks):
    content = rich()
    for _ in range(data.draw(st.integers(1, 3), label="corruptions")):
        path = data.draw(st.sampled_from(list(places(content))), label="place")
        if not path:
            content = data.draw(VALUES, label="value")
            break
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["replace", "delete", "double"]), label="action")
        if action == "replace":
            parent[path[-1]] = data.draw(VALUES, label="value")
        elif action == "delete":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        if not isinstance(content, (dict, list)):
            break
    text = json.dumps(content).encode()
    if data.draw(st.booleans(), label="cut"):
        start = data.draw(st.integers(0, len(text)), label="start")
        text = text[:start] + data.draw(st.binary(max_size=4), label="bytes") + text[start + 2 :]
    MetadataCatalog.pop(NAME, None)
    logging.disable(logging.WARNING)
    try:
        records, classes, _ = read(tmp_path, text, masks)
    except UserError as error:
        assert "\n" not in str(error)
        return
    finally:
        logging.disable(logging.NOTSET)
    for record in records:
        assert record["width"] > 0 and record["height"] > 0
        for annotation in record["annotations"]:
            assert np.isfinite(annotation["bbox"]).all()
            assert 0 <= annotation["category_id"] < len(classes)
    evaluated = results_of_one_box(tmp_path, records)
    assert all(np.isnan(value) or -1 <= value <= 100.001 for value in evaluated.values())


def results_of_one_box(folder, records):
    MetadataCatalog.get(NAME).set(json_file=str(folder / "a.json"), evaluator_type="coco")
    evaluator = build_evaluator(NAME, str(folder / "out"))
    evaluator.reset()
    for record in records:
        detections = Instances((int(record["height"]), int(record["width"])))
        detections.pred_boxes = Boxes(torch.tensor([[5.0, 10, 25, 22]]))
        detections.pred_classes = torch.tensor([0])
        detections.scores = torch.ones(1)
        evaluator.process([record], [{"instances": detections}])
    return evaluator.evaluate().get("bbox", {})
