"""Datasets in other formats than COCO JSON: what is recognised, what is read, what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from balanced_d2.data.checks.for_model import load
from balanced_d2.data.datasets.register import register_source
from balanced_d2.utils.arguments import split_at_key
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_MODEL, assert_user_error, logged, run_program, train_net

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
IMAGES = (".jpg", ".JPG", ".jpeg", ".png", ".tif", ".bmp", ".webp")
SIZE = (100, 80)


@pytest.fixture(autouse=True)
def registered():
    """Datasets are removed after the test."""
    before = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def write(folder: Path, *names, **files):
    """Write images (by their suffix, 100 x 80) and text files."""
    for name, content in (dict.fromkeys(names, "") | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in IMAGES:
            formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF"}
            kind = formats.get(path.suffix.lower(), path.suffix[1:].upper())
            Image.new("RGB", content or SIZE).save(path, kind)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def read(name, path, *more, **kwargs):
    """What is registered: {split: {image: [(class, x, y, width, height), ...]}}.

    Images are named by their real paths relative to the folder of the dataset.
    """
    root = Path(path) if Path(path).is_dir() else Path(path).parent
    found = {}
    for full_name in register_source(name, str(path), *map(str, more), **kwargs):
        records = load(full_name)
        classes = MetadataCatalog.get(full_name).thing_classes
        found[full_name.removeprefix(name).lstrip("_")] = {
            os.path.relpath(os.path.realpath(r["file_name"]), os.path.realpath(root)): [
                (classes[a["category_id"]], *(round(x, 3) for x in a["bbox"]))
                for a in r["annotations"]
            ]
            for r in records
        }
    return found


BOX = "1 0.5 0.5 0.2 0.5\n"  # of 100 x 80: x 40, y 20, width 20, height 40
YOLO_BOX = ("cat", 40, 20, 20, 40)
NAMES = "names: [dog, cat]\n"


def voc(*objects, name="a.jpg", size=SIZE, extra=""):
    written = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for label, x0, y0, x1, y1 in objects
    )
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation><filename>{name}</filename>{sizes}{extra}{written}</annotation>"


VOC = voc(("cat", 40, 20, 60, 60))


def coco(*file_names):
    return {
        "images": [
            {"id": i, "file_name": n, "width": 100, "height": 80} for i, n in enumerate(file_names)
        ],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [40, 20, 20, 40], "iscrowd": 0}
            for i in range(len(file_names))
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


CSV_HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
A, B = {"a.jpg": [YOLO_BOX]}, {"b.jpg": [YOLO_BOX]}
ROBOFLOW = ["train/images/a.jpg", "valid/images/b.jpg"]
ROBOFLOW_LABELS = {"train/labels/a.txt": BOX, "valid/labels/b.txt": BOX}
ROBOFLOW_FOUND = {
    "train": {"train/images/a.jpg": [YOLO_BOX]},
    "val": {"valid/images/b.jpg": [YOLO_BOX]},
}
ULTRALYTICS = ["images/train/a.jpg", "images/val/b.jpg"]
ULTRALYTICS_LABELS = {"labels/train/a.txt": BOX, "labels/val/b.txt": BOX}
ULTRALYTICS_FOUND = {
    "train": {"images/train/a.jpg": [YOLO_BOX]},
    "val": {"images/val/b.jpg": [YOLO_BOX]},
}

# The name; what to register; the images; the other files; what comes out.
LAYOUTS = [
    (
        *("YOLO of Roboflow, with ../", "", ROBOFLOW),
        {"data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\n" + NAMES},
        *(ROBOFLOW_LABELS, ROBOFLOW_FOUND),
    ),
    (
        *("YOLO, paths from the yaml", "data.yaml", ROBOFLOW),
        {"data.yaml": "train: train/images\nval: ./valid/images/\n" + NAMES},
        *(ROBOFLOW_LABELS, ROBOFLOW_FOUND),
    ),
    (
        *("YOLO, paths of another machine", "data.yaml", ROBOFLOW),
        {
            "data.yaml": "train: /content/fish-1/train/images\nval: /content/fish-1/valid/images\n"
            + NAMES
        },
        *(ROBOFLOW_LABELS, ROBOFLOW_FOUND),
    ),
    (
        *("YOLO, paths of Windows", "data.yaml", ROBOFLOW),
        {"data.yaml": "train: C:\\data\\train\\images\nval: 'D:\\valid\\images'\n" + NAMES},
        *(ROBOFLOW_LABELS, ROBOFLOW_FOUND),
    ),
    (
        *("YOLO of Ultralytics, path of another folder", "fish.yaml", ULTRALYTICS),
        {
            "fish.yaml": "path: ../datasets/fish\ntrain: images/train\nval: images/val\ntest:\n"
            "names:\n  0: dog\n  1: cat\n"
        },
        *(ULTRALYTICS_LABELS, ULTRALYTICS_FOUND),
    ),
    (
        *("YOLO, path from the yaml", "config/fish.yaml", ULTRALYTICS),
        {"config/fish.yaml": "path: ..\ntrain: images/train\nval: images/val\n" + NAMES},
        ULTRALYTICS_LABELS,
        {k: {f"../{n}": v for n, v in i.items()} for k, i in ULTRALYTICS_FOUND.items()},
    ),
    (
        *("YOLO, names in disorder, as text and with a gap", "data.yaml", ["images/a.jpg"]),
        {"data.yaml": "train: images\nnames: {3: bird, '1': cat, 0: dog}\n"},
        {"labels/a.txt": BOX + "3 0.5 0.5 1 1\n"},
        {"train": {"images/a.jpg": [YOLO_BOX, ("bird", 0, 0, 100, 80)]}},
    ),
    (
        *("YOLO, names that YAML reads as truth and numbers", "data.yaml", ["images/a.jpg"]),
        {"data.yaml": "train: images\nnames: [yes, no, 1.0, null]\n"},
        {"labels/a.txt": "1 .5 .5 1 1\n2 .5 .5 1 1\n3 .5 .5 1 1"},
        {"train": {"images/a.jpg": [(n, 0, 0, 100, 80) for n in ("no", "1.0", "null")]}},
    ),
    (
        *("YOLO, several folders for a split", "data.yaml", ["x/images/a.jpg", "y/images/b.jpg"]),
        {"data.yaml": "train: [x/images, y/images]\n" + NAMES},
        {"x/labels/a.txt": BOX, "y/labels/b.txt": BOX},
        {"train": {"x/images/a.jpg": [YOLO_BOX], "y/images/b.jpg": [YOLO_BOX]}},
    ),
    (
        *("YOLO, lists of images", "data.yaml", ULTRALYTICS),
        {"data.yaml": "path: .\ntrain: train.txt\nval: val.txt\n" + NAMES},
        {
            "train.txt": "./images/train/a.jpg\n",
            "val.txt": "/home/me/fish/images/val/b.jpg\r\n\r\n",
            **ULTRALYTICS_LABELS,
        },
        ULTRALYTICS_FOUND,
    ),
    (
        *("YOLO of Darknet and CVAT", "", ["obj_train_data/a.jpg"]),
        {"obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = x\n"},
        {
            "obj.names": "dog\ncat\n",
            "train.txt": "data/obj_train_data/a.jpg",
            "obj_train_data/a.txt": BOX,
        },
        {"train": {"obj_train_data/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("YOLO of Label Studio", "", ["images/a.jpg", "images/empty.png"], {}),
        {"labels/a.txt": BOX, "classes.txt": "dog\ncat", "notes.json": {"categories": []}},
        {"": {"images/a.jpg": [YOLO_BOX], "images/empty.png": []}},
    ),
    (
        *("YOLO of LabelImg, all in one folder", "", ["a.jpg", "b.JPG"], {}),
        {"a.txt": BOX, "b.txt": "", "classes.txt": "dog\ncat\n"},
        {"": {**A, "b.JPG": []}},
    ),
    (
        *("YOLO folders by kind, then split, without names", "", ULTRALYTICS, {}),
        ULTRALYTICS_LABELS,
        {k: {n: [("1", 40, 20, 20, 40)] for n in i} for k, i in ULTRALYTICS_FOUND.items()},
    ),
    (
        *("YOLO folders by split, then kind", "", [*ROBOFLOW, "preview.png"], {}),
        {**ROBOFLOW_LABELS, "classes.txt": "dog\ncat\n", "README.txt": "Fish."},
        ROBOFLOW_FOUND,
    ),
    (
        *("YOLO of Roboflow for Darknet", "", ["train/a.jpg", "valid/b.jpg"], {}),
        {
            "train/a.txt": BOX,
            "train/_darknet.labels": "dog\ncat",
            "valid/b.txt": BOX,
            "valid/_darknet.labels": "dog\ncat",
        },
        {"train": {"train/a.jpg": [YOLO_BOX]}, "val": {"valid/b.jpg": [YOLO_BOX]}},
    ),
    (
        *("YOLO, polygons beside boxes, a byte order mark, Windows' ends of lines", "data.yaml"),
        *(["images/a.jpg"], {"data.yaml": ("\ufeffval: images\r\n" + NAMES).encode()}),
        {"labels/a.txt": ("\ufeff1 0.4 0.25 0.6 0.25 0.6 0.75\r\n\r\n" + BOX).encode()},
        {"val": {"images/a.jpg": [YOLO_BOX, YOLO_BOX]}},
    ),
    (
        *("YOLO, test images without labels", "data.yaml", [*ROBOFLOW, "test/images/c.jpg"]),
        {"data.yaml": "train: train/images\nval: valid/images\ntest: test/images\n" + NAMES},
        *(ROBOFLOW_LABELS, ROBOFLOW_FOUND),
    ),
    (
        *("YOLO, a test folder that does not exist", "", ROBOFLOW),
        {
            "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
            + NAMES
        },
        *(ROBOFLOW_LABELS, ROBOFLOW_FOUND),
    ),
    (
        *("YOLO, the folder of the images", "images", ["images/a.jpg"], {}),
        {"images/results.csv": b"\xe9", "labels/a.txt": BOX, "classes.txt": "dog\ncat"},
        {"": A},
    ),
    (
        *("YOLO in the only folder of an archive of macOS", "", ["fish/images/a.jpg"], {}),
        {
            "fish/labels/a.txt": BOX,
            "fish/classes.txt": "dog\ncat",
            "__MACOSX/fish/images/._a.jpg": "",
            ".DS_Store": "",
        },
        {"": {"fish/images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC, XML beside images", "", ["a.jpg", "b.jpg"], {}),
        {"a.xml": VOC, "b.xml": VOC.replace("a.jpg", "b.jpg")},
        {"": {**A, **B}},
    ),
    (
        *("VOC of old, with lists", "", ["JPEGImages/a.jpg", "JPEGImages/b.jpg"], {}),
        {
            "Annotations/a.xml": VOC,
            "Annotations/b.xml": VOC,
            "ImageSets/Main/train.txt": "a\n",
            "ImageSets/Main/val.txt": "b  1\n",
            "ImageSets/Main/trainval.txt": "a\nb\n",
            "ImageSets/Main/cat_train.txt": "a -1\n",
        },
        {"train": {"JPEGImages/a.jpg": [YOLO_BOX]}, "val": {"JPEGImages/b.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC of VOC itself, in which the first pixel is 1", "", []),
        {"VOCdevkit/VOC2007/JPEGImages/a.jpg": ""},
        {
            "VOCdevkit/VOC2007/Annotations/a.xml": voc(
                ("cat", 41, 21, 60, 60),
                extra="<source><database>The VOC2007 Database</database></source>",
            )
        },
        {"": {"VOCdevkit/VOC2007/JPEGImages/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC, images in images/, sorted classes, sub-folders of one name", ""),
        *(["images/x/a.jpg", "images/y/a.jpg"], {}),
        {
            "annotations/x/a.xml": voc(("dog", 0, 0, 9, 9), ("cat", 40, 20, 60, 60)),
            "annotations/y/a.xml": VOC,
        },
        {"": {"images/x/a.jpg": [("dog", 0, 0, 9, 9), YOLO_BOX], "images/y/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC of Roboflow", "", ["train/a.jpg", "valid/a.jpg"], {}),
        {"train/a.xml": VOC, "valid/a.xml": VOC},
        {"train": {"train/a.jpg": [YOLO_BOX]}, "val": {"valid/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC, renamed files, another suffix, no size, a path of Windows", "", ["new.png"], {}),
        {
            "new.xml": voc(
                *[("cat", 40, 20, 60, 60)],
                **{"name": "old.jpg", "size": (0, 0), "extra": "<path>C:\\x\\old.jpg</path>"},
            )
        },
        {"": {"new.png": [YOLO_BOX]}},
    ),
    (
        *("VOC, parts of objects are not objects", "", ["a.jpg"], {}),
        {
            "a.xml": VOC.replace(
                "</object>",
                "<part><name>ear</name><bndbox><xmin>1</xmin></bndbox></part></object>",
            )
        },
        {"": A},
    ),
    (
        *("VOC, only a polygon, UTF-16, a name with & in another script", "", ["a.jpg"], {}),
        {
            "a.xml": (
                '<?xml version="1.0" encoding="utf-16"?><annotation><filename>a.jpg</filename>'
                "<object><name> 猫 &amp; Käfer </name><polygon><x1>40</x1><y1>20</y1><x2>60</x2>"
                "<y2>20</y2><x3>60</x3><y3>60</y3></polygon></object></annotation>"
            ).encode("utf-16")
        },
        {"": {"a.jpg": [("猫 & Käfer", 40, 20, 20, 40)]}},
    ),
    (
        *("CSV with a header", "boxes.csv", ["a.jpg", "b.jpg"], {}),
        {"boxes.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\nb.jpg,100,80,,,,,\n"},
        {"": {**A, "b.jpg": []}},
    ),
    (
        *("CSV of Excel in German, images in a folder", "", ["images/a.jpg"], {}),
        {
            "boxes.csv": ("\ufeff" + CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\r\n")
            .replace(",", ";")
            .encode()
        },
        {"": {"images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV of Roboflow", "", ["train/a.jpg", "test/a.jpg"], {}),
        {
            "train/_annotations.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n",
            "test/_annotations.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n",
        },
        {"train": {"train/a.jpg": [YOLO_BOX]}, "test": {"test/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV of TensorFlow's tutorials", "", ["images/a.jpg", "images/b.jpg"], {}),
        {
            "data/train_labels.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n",
            "data/test_labels.csv": CSV_HEADER + "b.jpg,100,80,cat,40,20,60,60\n",
        },
        {"train": {"images/a.jpg": [YOLO_BOX]}, "test": {"images/b.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV with other names and order of columns", "boxes.csv", ["a.jpg"], {}),
        {"boxes.csv": 'Image Path,x_min,x_max,Y_MIN,Y_MAX,label\n"/x/a.jpg",40,60,20,60,"a, b"\n'},
        {"": {"a.jpg": [("a, b", 40, 20, 20, 40)]}},
    ),
    (
        *("CSV of keras-retinanet, with classes", "boxes.csv", ["img/a.jpg", "img/b.jpg"], {}),
        {
            "boxes.csv": "img/a.jpg,40,20,60,60,cat\nimg/b.jpg,,,,,\n",
            "classes.csv": "dog,1\ncat,0\n",
        },
        {"": {"img/a.jpg": [YOLO_BOX], "img/b.jpg": []}},
    ),
    (
        *("CSV of Google's AutoML", "export.csv", ["a.jpg", "b.jpg"], {}),
        {
            "export.csv": "TRAIN,gs://bucket/x/a.jpg,cat,0.4,0.25,,,0.6,0.75,,\n"
            "VALIDATION,gs://bucket/x/b.jpg,cat,0.4,0.25,0.6,0.25,0.6,0.75,0.4,0.75\n"
        },
        {"train": A, "val": B},
    ),
    (
        *("CSV of Open Images", "", ["train/a.jpg"], {}),
        {
            "train-annotations-bbox.csv": "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
            "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
            "a,xclick,/m/01yrx,1,0.4,0.6,0.25,0.75,0,0,0,0,0\n",
            "class-descriptions-boxable.csv": "/m/01yrx,cat\n/m/0bt9lr,dog\n",
        },
        {"train": {"train/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV, a file with the name of a split", "train.csv", ["a.jpg", "old/a.jpg"], {}),
        {"train.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n"},
        {"": A},
    ),
    (
        *("COCO of Roboflow", "", ["train/a.jpg", "valid/b.jpg"], {}),
        {
            "train/_annotations.coco.json": coco("a.jpg"),
            "valid/_annotations.coco.json": coco("b.jpg"),
            "README.roboflow.txt": "Fish",
        },
        {"train": {"train/a.jpg": [YOLO_BOX]}, "val": {"valid/b.jpg": [YOLO_BOX]}},
    ),
    (
        *("COCO as COCO itself", "", ["train2017/a.jpg", "val2017/b.jpg"], {}),
        {
            "annotations/instances_train2017.json": coco("a.jpg"),
            "annotations/instances_val2017.json": coco("b.jpg"),
            "annotations/person_keypoints_train2017.json": coco("a.jpg"),
            "annotations/captions_train2017.json": {"images": [], "annotations": []},
        },
        {"train": {"train2017/a.jpg": [YOLO_BOX]}, "val": {"val2017/b.jpg": [YOLO_BOX]}},
    ),
    (
        *("COCO of CVAT", "", ["images/default/a.jpg"], {}),
        {"annotations/instances_default.json": coco("a.jpg")},
        {"": {"images/default/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("COCO of Label Studio, a file", "result.json", ["images/a.jpg"], {}),
        {"result.json": coco("images/a.jpg")},
        {"": {"images/a.jpg": [YOLO_BOX]}},
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_layout(tmp_path, layout):
    _, path, images, files, more_files, expected = layout
    write(tmp_path, *images, **files, **more_files)
    found = read("layout", tmp_path / path)
    assert {s: {i: sorted(b) for i, b in images.items()} for s, images in found.items()} == {
        s: {i: sorted(b) for i, b in images.items()} for s, images in expected.items()
    }
    (line,) = {MetadataCatalog.get(n).source for n in DatasetCatalog if n.startswith("layout")}
    assert layout[0].split()[0].strip(",") in line  # the format
    for split, images in found.items():
        assert f"layout{'_' * bool(split)}{split} ({len(images)} images)" in line


REFUSED = [
    ("nothing", "gone", {}, ["gone does not exist"]),
    ("an empty folder", "", {}, ["it is empty"]),
    ("images only", "", {"a.jpg": "", "b.jpg": ""}, ["2 file(s) .jpg"]),
    ("an archive", "x.zip", {"x.zip": "PK"}, ["is an archive; unpack it"]),
    ("a picture", "a.jpg", {"a.jpg": ""}, ["a.jpg is not a dataset"]),
    (
        *("two formats", "", {"a.jpg": "", "a.xml": VOC, "a.txt": BOX}),
        ["has YOLO (", "a.txt) and Pascal VOC XML (", "a.xml)"],
    ),
    (
        *("two yaml files", "", {f"{n}.yaml": "train: x\n" + NAMES for n in "ab"}),
        ["several YOLO datasets", "a.yaml", "b.yaml"],
    ),
    ("LabelMe", "", {"a.json": {"shapes": [], "imagePath": "a.jpg"}}, ["LabelMe", "as COCO"]),
    (
        "VIA",
        "",
        {"a.json": {"_via_settings": {}, "_via_img_metadata": {}}},
        ["VGG Image Annotator"],
    ),
    ("CreateML", "a.json", {"a.json": [{"image": "a", "annotations": []}]}, ["CreateML"]),
    ("broken JSON", "a.json", {"a.json": "{"}, ["no valid JSON"]),
    ("CVAT's XML", "a.xml", {"a.xml": "<annotations></annotations>"}, ["not Pascal VOC"]),
    ("another CSV", "a.csv", {"a.csv": "epoch,loss\n1,2\n"}, ["epoch,loss", "filename, class"]),
    ("x, y, w, h", "a.csv", {"a.csv": "filename,x,y,w,h,class\n"}, ["no table of boxes"]),
    (
        *("a path in data.yaml", "data.yaml", {"data.yaml": "train: nowhere/images\n" + NAMES}),
        ["data.yaml: train is nowhere/images, which exists neither"],
    ),
    (
        *("two splits in one folder", "data.yaml"),
        {"images/a.jpg": "", "data.yaml": "train: /x/train/images\nval: /x/val/images\n" + NAMES},
        ["both lead to"],
    ),
    ("no split in data.yaml", "data.yaml", {"data.yaml": NAMES}, ["none of the keys train, val"]),
    (
        *("nc", "data.yaml", {"images/a.jpg": "", "data.yaml": "nc: 3\ntrain: images\n" + NAMES}),
        ["nc is 3, but there are 2 names"],
    ),
    (
        *("no labels", "data.yaml", {"images/a.jpg": "", "data.yaml": "train: images\n" + NAMES}),
        ["none of the 1 images has a label file", "a.txt"],
    ),
    (
        *("a list in data.yaml that is endless as text", "data.yaml"),
        {
            "a.jpg": "",
            "data.yaml": "a0: &a0 [x]\n"
            + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(12))
            + "names: *a12\ntrain: a.jpg\n",
        },
        ["data.yaml: names has [", "not a name"],
    ),
    ("pose", "data.yaml", {"data.yaml": "train: x\nkpt_shape: [17, 3]\n"}, ["keypoints"]),
    (
        *("a list of images", "data.yaml"),
        {"data.yaml": "train: t.txt\n" + NAMES, "t.txt": "a.jpg\nb.jpg\n", "a.jpg": ""},
        ["t.txt: 1 of 2 image(s) in it do not exist: b.jpg"],
    ),
    *(
        (f"a label {line!r}", "", {"a.jpg": "", "a.txt": BOX + line, "classes.txt": "dog\ncat"}, m)
        for line, m in (
            ("1 40 20 60 60", ["a.txt, line 2: 40 20 60 60", "are they pixels?"]),
            ("2 .5 .5 .1 .1", ["a.txt, line 2: its class is 2, but there are 2 classes"]),
            ("-1 .5 .5 .1 .1", ["a.txt, line 2: its class is -1"]),
            ("0.5 .5 .5 .1 .1", ["its class is 0.5"]),
            ("1 .5 .5 .1 .1 .9", ["has 6 numbers (is the last one a score?"]),
            ("1 .5 .5 .1", ["has 4 numbers"]),
            ("cat .5 .5 .1 .1", ["a.txt, line 2: not all are numbers: cat"]),
            ("1 nan .5 .1 .1", ["a.txt, line 2: not all are numbers: 1 nan"]),
        )
    ),
    ("an image that is none", "", {"a.png": "", "b.JPG": "", "b.txt": BOX, "a.txt": BOX}, []),
    (
        *("half of the images in splits", ""),
        {"images/train/a.jpg": "", "images/b.jpg": "", "labels/train/a.txt": BOX}
        | {"labels/b.txt": BOX},
        ["1 labelled image(s) are in no folder of a split"],
    ),
    ("VOC without images", "", {"a.xml": VOC}, ["none of the images of 1 XML", "last argument"]),
    (
        "VOC, one without image and size",
        "",
        {"a.jpg": "", "a.xml": VOC} | {"b.xml": voc(name="b.jpg", size=(0, 0))},
        ["of 1 XML file(s) do not exist", "b.jpg"],
    ),
    ("VOC, broken", "", {"a.jpg": "", "a.xml": VOC[:-9]}, ["a.xml is not valid XML", "line 1"]),
    (
        *("VOC, a word for a number", "", {"a.jpg": "", "a.xml": VOC.replace("40", "left")}),
        ["a.xml, object 1: <xmin> of its <bndbox> is 'left', not a number"],
    ),
    (
        *("VOC, a rotated box", "", {"a.jpg": "", "a.xml": VOC.replace("bndbox", "robndbox")}),
        ["object 1 (cat) has a rotated box"],
    ),
    (
        *("VOC of images that were scaled", "", {"a.jpg": "", "a.xml": voc(size=(200, 160))}),
        ["a.jpg is 100 x 80, not 200 x 160", "scaled"],
    ),
    (
        *("VOC, a list with unknown names", ""),
        {"a.jpg": "", "a.xml": VOC, "ImageSets/Main/train.txt": "a\nz\n"},
        ["train.txt: there is not one XML file for 1", "z"],
    ),
    (
        *("VOC, two images of one name", ""),
        {"x/a.jpg": "", "y/a.jpg": "", "Annotations/a.xml": VOC},
        ["a.xml: Annotations/a may be ", "x/a.jpg", "y/a.jpg"],
    ),
    (
        *("CSV in fractions", "a.csv"),
        {"a.jpg": "", "a.csv": CSV_HEADER + "a.jpg,100,80,cat,.1,.1,.5,.5\n"},
        ["all boxes are between 0 and 1", "line 2"],
    ),
    (
        *("Google's CSV in pixels", "a.csv"),
        {"a.jpg": "", "a.csv": "TRAIN,a.jpg,cat,40,20,,,60,60,,\n"},
        ["a.csv, line 1", "no fractions"],
    ),
    (
        *("CSV with half a row", "a.csv"),
        {"a.jpg": "", "a.csv": CSV_HEADER + "a.jpg,100,80,cat,1,2\n"},
        ["a.csv, line 2: its box is 1, 2, ,, not four numbers"],
    ),
    (
        *("CSV without a class", "a.csv"),
        {"a.jpg": "", "a.csv": CSV_HEADER + "a.jpg,100,80,,1,2,3,4\n"},
        ["a.csv, line 2 has a box, but no class"],
    ),
    (
        *("CSV in Latin-1", "a.csv"),
        {"a.jpg": "", "a.csv": (CSV_HEADER + "a.jpg,100,80,Käfer,1,2,3,4\n").encode("latin-1")},
        ["a.csv is not text in UTF-8"],
    ),
    (
        *("CSV in Latin-1, in a folder", ""),
        {"a.jpg": "", "a.csv": (CSV_HEADER + "a.jpg,100,80,Käfer,1,2,3,4\n").encode("latin-1")},
        ["a.csv is not text in UTF-8"],
    ),
    (
        *("CSV of images in folders that are not there", "a.csv"),
        {
            "x/a.jpg": "",
            "a.csv": CSV_HEADER + "".join(f"{f}/a.jpg,100,80,cat,1,2,3,4\n" for f in ("y", "z")),
        },
        ["a.csv, line 3: there is no image z/a.jpg", "y/a.jpg"],
    ),
    (
        *("COCO without images", "", {"a.json": coco("x.jpg")}),
        ["its images, such as x.jpg, have not been found"],
    ),
    (
        *(
            "several COCO files",
            "",
            {"a.jpg": "", "a.json": coco("a.jpg"), "b.json": coco("a.jpg")},
        ),
        ["several COCO files", "a.json", "b.json"],
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(tmp_path, case):
    what, path, files, parts = case
    write(tmp_path, **files)
    if what == "an image that is none":
        (tmp_path / "a.png").write_text("no image")
        parts = ["1 of 2 image(s) cannot be read", "a.png is not an image"]
    with pytest.raises(UserError) as error:
        register_source("refused", str(tmp_path / path))
    assert str(error.value).startswith("--register refused: ") and "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert not [name for name in DatasetCatalog if name.startswith("refused")]


def same_boxes(found, expected, tolerance=0.01):
    """Compare boxes in COCO files, whatever their order; return those only in ``found``."""
    assert found.keys() == expected.keys()
    more = []
    for image, boxes in found.items():
        left = list(expected[image])
        for label, *box in boxes:
            match = next(
                (
                    other
                    for other in left
                    if other[0] == label
                    and max(abs(a - b) for a, b in zip(box, other[1:])) <= tolerance
                ),
                None,
            )
            more.append((label, *box)) if match is None else left.remove(match)
        assert not left, image
    return more


def boxes_in(json_file, image_root):
    """{real path of an image: [(class, x, y, width, height)]} of a COCO file."""
    content = json.loads(Path(json_file).read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    paths = {
        i["id"]: os.path.realpath(Path(image_root) / i["file_name"]) for i in content["images"]
    }
    boxes = {path: [] for path in paths.values()}
    for a in content["annotations"]:
        boxes[paths[a["image_id"]]].append((names[a["category_id"]], *a["bbox"]))
    sizes = {paths[i["id"]]: (i["width"], i["height"]) for i in content["images"]}
    return boxes, sizes, list(names.values())


@needs_shared
@pytest.mark.parametrize("dataset", ["aquarium", "bccd"])
def test_round_trip(dataset):
    """Aquarium's YOLO and BCCD's VOC are the same as their COCO files."""
    folder = SHARED / dataset
    if dataset == "aquarium":
        register_source("twin", str(folder / "data.yaml"))
        image_root = folder
    else:
        register_source("twin", str(folder / "voc"), str(folder / "images"))
        image_root = folder / "images"
    more = []
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"twin_{split}")
        boxes, sizes, names = boxes_in(metadata.json_file, metadata.image_root)
        expected, expected_sizes, expected_names = boxes_in(folder / f"{split}.json", image_root)
        assert sizes == expected_sizes
        # VOC has no order of classes.
        assert names == (expected_names if dataset == "aquarium" else sorted(expected_names))
        more += same_boxes(boxes, expected)
    # A box of half a pixel, which is not in Aquarium's COCO file.
    assert [max(box[3:]) < 0.5 for box in more] == [True] * (dataset == "aquarium")


def coco_twin(name, split, folder):
    """A published COCO file, with what another format cannot say as ``name`` has read it.

    Aquarium's COCO file has boxes that are rounded to 0.01 pixels, and lacks one of half a pixel;
    VOC has no order of classes, so that they are sorted.
    """
    content = json.loads((SHARED / folder / f"{split}.json").read_text())
    read = json.loads(Path(MetadataCatalog.get(f"{name}_{split}").json_file).read_text())
    numbers = {c["name"]: c["id"] for c in read["categories"]}
    titles = {c["id"]: c["name"] for c in content["categories"]}
    content["categories"] = read["categories"]
    ids = {os.path.basename(image["file_name"]): image["id"] for image in content["images"]}
    own = {image["id"]: ids[os.path.basename(image["file_name"])] for image in read["images"]}
    boxes = {image_id: [] for image_id in own.values()}
    for annotation in read["annotations"]:
        boxes[own[annotation["image_id"]]].append(annotation)
    twins = []
    for annotation in content["annotations"]:
        annotation["category_id"] = numbers[titles[annotation["category_id"]]]
        same = boxes[annotation["image_id"]]
        while max(same[0]["bbox"][2:]) < 0.5 <= max(annotation["bbox"][2:]):
            twins.append({**same.pop(0), "image_id": annotation["image_id"]})
        twin = same.pop(0)
        assert twin["category_id"] == annotation["category_id"]
        assert twin["bbox"] == pytest.approx(annotation["bbox"], abs=0.01)
        twins.append({**annotation, "bbox": twin["bbox"]})
    twins += [
        {**twin, "image_id": image_id, "id": 10**6 + number}
        for image_id, left in boxes.items()
        for number, twin in enumerate(left)
    ]
    assert len(twins) == len(read["annotations"])
    content["annotations"] = [{**twin, "id": number} for number, twin in enumerate(twins, 1)]
    return content


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("folder", ["aquarium", "bccd"])
def test_the_same_training(folder, tmp_path):
    """A training on YOLO or VOC is, to the bit, that on the COCO file of the same data."""
    root, paths = SHARED / "aquarium", [SHARED / "aquarium" / "data.yaml"]
    if folder == "bccd":
        root, paths = SHARED / "bccd" / "images", [SHARED / "bccd" / "voc", SHARED / "bccd/images"]
    register_source("read", *map(str, paths))
    twin = tmp_path / "twin.json"
    twin.write_text(json.dumps(coco_twin("read", "train", folder)))
    outcomes = []
    for number, arguments in enumerate(
        (
            ("--register", "own", *paths, "DATASETS.TRAIN", "('own_train',)"),
            ("--register", "own", twin, root, "DATASETS.TRAIN", "('own',)"),
        )
    ):
        output = tmp_path / str(number)
        result = train_net(
            *(*arguments, "DATASETS.TEST", "()", "OUTPUT_DIR", output, "SEED", "1"),
            *TINY_MODEL[2:],
        )
        assert result.returncode == 0, result.stderr
        weights = torch.load(output / "model_final.pth")["model"]
        losses = [
            {key: value for key, value in line.items() if "loss" in key or "num_" in key}
            for line in logged(output)
        ]
        outcomes.append((losses, weights))
    (losses, weights), (other_losses, other_weights) = outcomes
    assert losses == other_losses and any("loss_box_reg" in line for line in losses)
    assert weights.keys() == other_weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, other_weights[key]), key


def test_polygons_become_masks(tmp_path):
    write(tmp_path, "a.jpg", **{"a.txt": "0 .4 .25 .6 .25 .6 .75 .4 .75\n0 .5 .5 .2 .5"})
    register_source("masks", str(tmp_path))
    outline, box = load("masks")[0]["annotations"]
    assert outline["segmentation"] == [pytest.approx([40, 20, 60, 20, 60, 60, 40, 60])]
    assert outline["bbox"] == pytest.approx(box["bbox"]) and "segmentation" not in box
    content = json.loads(Path(MetadataCatalog.get("masks").json_file).read_text())
    assert [a["area"] for a in content["annotations"]] == pytest.approx([800, 800])


def test_rotated_photographs(tmp_path):
    """Sizes are those of the image as it is shown."""
    image = Image.new("RGB", (100, 80))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    write(tmp_path, **{"a.txt": BOX, "classes.txt": "dog\ncat"})
    register_source("rotated", str(tmp_path))
    (record,) = load("rotated")
    assert (record["width"], record["height"]) == (80, 100)
    assert record["annotations"][0]["bbox"] == pytest.approx([32, 25, 16, 50])


def test_groups_of_open_images_are_crowds(tmp_path):
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n"
    write(tmp_path, "a.jpg", **{"x.csv": header + "a,cat,0,1,0,1,1\na,cat,0,1,0,1,0\n"})
    register_source("groups", str(tmp_path))
    assert [a["iscrowd"] for a in load("groups")[0]["annotations"]] == [1, 0]


def test_what_is_left_out_is_reported(tmp_path, caplog):
    write(tmp_path, "images/a.jpg", "more/b.jpg", **{"labels/a.txt": BOX, "labels/z.txt": BOX})
    register_source("reported", str(tmp_path))
    with caplog.at_level("INFO"):
        load("reported")
    for part in (
        f"YOLO from {tmp_path}: reported (1 images)",
        "left out 1 image(s) in folders without labels",
        "left out 1 text file(s) without an image",
        "the names of the classes are in no file: using numbers",
    ):
        assert caplog.text.count(part) >= 1, part


def test_words_of_the_config():
    for words, taken in (
        (["a", "b.yaml", "SOLVER.MAX_ITER", "2"], 2),
        (["a", "TRAIN", "OUTPUT_DIR", "x"], 2),
        (["a", "b.json", "images/", "SEED", "1"], 3),
        (["a", "b.json", "images", "train.max_iter=2"], 3),
        (["a", "b"], 2),
    ):
        assert split_at_key(words, start=2) == (words[:taken], words[taken:])


def test_programs(tmp_path, train_net_here, run_here):
    """Training and tools take the same arguments, whatever the format."""
    write(tmp_path, *(f"images/{i}.jpg" for i in range(6)))
    write(tmp_path, **{f"labels/{i}.txt": f"{i % 2} 0.5 0.5 0.4 0.5\n" for i in range(6)})
    own = ("--register", "own", tmp_path)
    result = train_net_here(
        *("--split", "0.3", *own, "DATASETS.TRAIN", "('own_train',)"),
        *("DATASETS.TEST", "('own_val',)", "OUTPUT_DIR", tmp_path / "output", *TINY_MODEL),
    )
    assert result.returncode == 0, result.stderr
    line = f"YOLO from {tmp_path}: own_train (4 images), own_val (2 images)"
    assert (tmp_path / "output" / "log.txt").read_text().count(line + "\n") == 1
    assert (tmp_path / "output" / "inference" / "coco_instances_results.json").exists()
    config = ("--config-file", tmp_path / "output" / "config.yaml")
    weights = ("MODEL.WEIGHTS", tmp_path / "output" / "model_final.pth")
    result = run_here(
        *("demo.py", *config, "--input", tmp_path / "images", "--output", tmp_path / "drawn"),
        *("--split", "0.3", *own, *weights),
    )
    assert result.returncode == 0 and "6 of 6 input(s)" in result.stdout, result.stderr
    result = run_here("tools/check_dataset.py", *own, "--split", "0.3")
    assert result.returncode == 0 and line in result.stdout, result.stderr
    assert "own_val': 2 images" in result.stdout
    result = run_here("tools/check_dataset.py", "own", *own, "--split", "0.3")
    assert_user_error(result, "'own' is not registered, but own_train, own_val are")


@pytest.mark.slow
def test_programs_as_they_are_called(tmp_path):
    write(tmp_path, "a.jpg", **{"a.txt": BOX})
    result = run_program("tools/check_dataset.py", "--register", "x", tmp_path, "--split", "0.2")
    assert_user_error(result, "needs at least two images")


def test_wrong_arguments(tmp_path, run_here):
    write(tmp_path, "a.jpg", **{"a.txt": BOX})
    for arguments, part in (
        (("--register", "x", tmp_path, tmp_path, "more"), "--register takes a name, a file or"),
        (("--register", "x"), "--register takes a name"),
        (("--split", "0.2"), "there are none"),
        (("--register", "x", tmp_path, "--split", "1"), "not between 0 and 1"),
        (("--register", "x", tmp_path, "--register", "x", tmp_path), "already registered"),
        ((), "there is nothing to check"),
    ):
        assert_user_error(run_here("tools/check_dataset.py", *arguments), part)


def test_a_split_is_not_split_again(tmp_path):
    write(tmp_path, *ROBOFLOW, **ROBOFLOW_LABELS)
    with pytest.raises(UserError, match="already has a split; leave out --split"):
        register_source("again", str(tmp_path), fraction=0.2)


def test_split_of_coco(tmp_path):
    """With the folder of the images and without."""
    write(tmp_path, *(f"images/{i}.jpg" for i in range(5)))
    write(tmp_path, **{"all.json": coco(*(f"{i}.jpg" for i in range(5)))})
    found = read("one", tmp_path / "all.json", tmp_path / "images", fraction=0.4)
    assert found == read("two", tmp_path / "all.json", fraction=0.4)
    assert {split: len(images) for split, images in found.items()} == {"train": 3, "val": 2}
