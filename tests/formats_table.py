"""Datasets as people have them: one table of files and exports, and what comes out of each.

``READ`` has those that are read, with their boxes; ``REFUSED`` those that are not, with parts of
the message, which says in one line what was found and what to do. Fields of COCO's JSON have a
table of their own, in test_coco_as_it_comes.py.

A row: what it is; what is registered, within its folder; its files, images without content;
what comes out. ``test_formats.py`` writes, registers and reads each.
"""

import json

SIZE = (100, 80)
"""Of images, in pixels."""
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


VIA_HEADER = (
    "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,"
    "region_attributes\n"
)
VIA_RECT = {"name": "rect", "x": 40, "y": 20, "width": 20, "height": 40}
VIA_POLYGON = {"name": "polygon", "all_points_x": [40, 60, 60], "all_points_y": [20, 20, 60]}


def via_row(name, shape, attributes, number=0):
    cells = (json.dumps(cell).replace('"', '""') for cell in ({}, shape, attributes))
    file_attributes, shape, attributes = (f'"{cell}"' for cell in cells)
    count = int(shape != '"{}"')
    return f"{name},7,{file_attributes},{count},{number},{shape},{attributes}\n"


def via(name="a.jpg", *regions):
    """VIA's JSON of an image; regions are (shape, attributes)."""
    return {
        f"{name}7": {
            "filename": name,
            "size": 7,
            "regions": [
                {"shape_attributes": shape, "region_attributes": attributes}
                for shape, attributes in regions
            ],
            "file_attributes": {},
        }
    }


# The name; what to register; the images; the other files; what comes out.
READ = [
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
    (
        *("VGG Image Annotator, CSV", "", ["a.jpg", "b.jpg"], {}),
        {
            "via_export_csv.csv": VIA_HEADER
            + via_row("a.jpg", VIA_RECT, {"class": "cat", "pose": "sitting"})
            + via_row("a.jpg", VIA_POLYGON, {"class": "dog", "pose": ""}, 1)
            + via_row("b.jpg", {}, {})
        },
        {"": {"a.jpg": [YOLO_BOX, ("dog", 40, 20, 20, 40)], "b.jpg": []}},
    ),
    (
        *("VGG Image Annotator, CSV of version 1, a file", "via.csv", ["x/a.jpg"], {}),
        {"via.csv": f"#{VIA_HEADER}" + via_row("a.jpg", VIA_RECT, {"animal": "cat"})},
        {"": {"x/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VGG Image Annotator, JSON, circles and ellipses, check boxes", "", ["a.jpg"], {}),
        {
            "via_region_data.json": via(
                "a.jpg",
                ({"name": "circle", "cx": 50, "cy": 40, "r": 10}, {"kind": {"cat": True}}),
                (
                    {"name": "ellipse", "cx": 50, "cy": 40, "rx": 20, "ry": 10, "theta": 0},
                    {"kind": {"cat": False, "dog": True}},
                ),
            )
        },
        {"": {"a.jpg": [("cat", 40, 30, 20, 20), ("dog", 30, 30, 40, 20)]}},
    ),
    (
        *("VGG Image Annotator, a project", "project.json", ["a.jpg"], {}),
        {
            "project.json": {
                "_via_settings": {},
                "_via_img_metadata": via("a.jpg", (VIA_RECT, {"name": "cat"})),
                "_via_attributes": {},
            }
        },
        {"": A},
    ),
    (
        *("VGG Image Annotator, split, no attributes", "", ["train/a.jpg", "val/b.jpg"], {}),
        {
            "train/via_region_data.json": via("a.jpg", (VIA_RECT, {})),
            "val/via_region_data.json": via("b.jpg", (VIA_POLYGON, {})),
        },
        {
            "train": {"train/a.jpg": [("object", 40, 20, 20, 40)]},
            "val": {"val/b.jpg": [("object", 40, 20, 20, 40)]},
        },
    ),
    (
        *("CSV of makesense.ai", "", ["a.jpg", "b.jpg"], {}),
        {"labels_my-project.csv": "cat,40,20,20,40,a.jpg,100,80\ncat,40,20,20,40,b.jpg,100,80\n"},
        {"": {**A, **B}},
    ),
    (
        *("YOLO of makesense.ai, labels and images apart", "", ["images/a.jpg"], {}),
        {"labels_my-project_yolo/a.txt": BOX, "labels/a.txt": BOX, "classes.txt": "dog\ncat"},
        {"": {"images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV of TensorFlow's tutorials, without its header", "", ["a.jpg"], {}),
        {"labels.csv": "a.jpg,100,80,cat,40,20,60,60\n"},
        {"": A},
    ),
    (
        *("CSV of Excel, semicolons and decimal commas", "", ["a.jpg"], {}),
        {
            "boxes.csv": (CSV_HEADER + "a.jpg,100,80,cat,40:5,20:25,60,60\n")
            .replace(",", ";")
            .replace(":", ",")
        },
        {"": {"a.jpg": [("cat", 40.5, 20.25, 19.5, 39.75)]}},
    ),
    (
        *("CSV with tabs", "boxes.tsv", ["a.jpg"], {}),
        {"boxes.tsv": (CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n").replace(",", "\t")},
        {"": A},
    ),
    (
        *("CSV with absolute paths of Windows", "boxes.csv", ["img/a.jpg"], {}),
        {"boxes.csv": CSV_HEADER + "C:\\Users\\me\\img\\a.jpg,100,80,cat,40,20,60,60\r\n"},
        {"": {"img/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV of Google's Vertex AI", "import.csv", ["a.jpg", "b.jpg"], {}),
        {
            "import.csv": "training,gs://bucket/a.jpg,cat,0.4,0.25,,,0.6,0.75,,\n"
            "test,gs://bucket/b.jpg,cat,0.4,0.25,0.6,0.25,0.6,0.75,0.4,0.75\n"
        },
        {"train": A, "test": B},
    ),
    (
        *("CSV of Google's Vertex AI, without a split", "import.csv", ["a.jpg"], {}),
        {"import.csv": "gs://bucket/a.jpg,cat,0.4,0.25,,,0.6,0.75,,\n"},
        {"": A},
    ),
    (
        *("YOLO, poses", "data.yaml", ["images/a.jpg"]),
        {"data.yaml": "train: images\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\n" + NAMES},
        {"labels/a.txt": "1 0.5 0.5 0.2 0.5 0.45 0.5 2 0 0 0\n"},
        {"train": {"images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("YOLO, rotated boxes as four corners", "data.yaml", ["images/a.jpg"]),
        {"data.yaml": "train: images\n" + NAMES},
        {"labels/a.txt": "1 0.4 0.25 0.6 0.25 0.6 0.75 0.4 0.75\n"},
        {"train": {"images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("YOLO of Windows, upper-case endings", "", ["A.JPG", "B.JPG"], {}),
        {"A.TXT": BOX, "B.TXT": "", "classes.txt": "dog\r\ncat\r\n"},
        {"": {"A.JPG": [YOLO_BOX], "B.JPG": []}},
    ),
    (
        *("YOLO, names with spaces, dots and other scripts", "", ["images/猫 (1).v2.jpg"]),
        {"data.yaml": "train: images\nnames: ['a dog', 'cat']\n"},
        {"labels/猫 (1).v2.txt": BOX},
        {"train": {"images/猫 (1).v2.jpg": [YOLO_BOX]}},
    ),
    (
        *("YOLO, a number of classes without names", "data.yaml", ["images/a.jpg"]),
        {"data.yaml": "train: images\nnc: 3\n"},
        {"labels/a.txt": BOX},
        {"train": {"images/a.jpg": [("1", 40, 20, 20, 40)]}},
    ),
    (
        *("YOLO of CVAT for Ultralytics", "", ["images/train/a.jpg"]),
        {"data.yaml": "names:\n  0: dog\n  1: cat\npath: .\ntrain: train.txt\n"},
        {"train.txt": "data/images/train/a.jpg\n", "labels/train/a.txt": BOX},
        {"train": {"images/train/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC of CVAT", "", ["JPEGImages/a.jpg"], {}),
        {
            "Annotations/a.xml": VOC,
            "ImageSets/Main/default.txt": "a\n",
            "labelmap.txt": "# label:color_rgb:parts:actions\ncat:128,0,0::\n",
        },
        {"": {"JPEGImages/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC of Label Studio", "", ["images/a.jpg"], {}),
        {"Annotations/a.xml": VOC.replace("a.jpg", "a")},
        {"": {"images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC of LabelImg, with attributes, upper-case endings", "", ["A.JPG"], {}),
        {"A.XML": VOC.replace("<annotation>", '<annotation verified="yes">', 1)},
        {"": {"A.JPG": [YOLO_BOX]}},
    ),
    (
        *(
            "VOC, an accent in two forms of Unicode, of macOS",
            "",
            ["images/Ka\u0308se.jpg"],
        ),
        *({}, {"xml/x.xml": VOC.replace("a.jpg", "K\u00e4se.jpg")}),
        {"": {"images/Ka\u0308se.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC, images of one name with different endings", "", ["a.jpg", "a.png"], {}),
        {"a.xml": VOC.replace("a.jpg", "a.png")},
        {"": {"a.png": [YOLO_BOX]}},
    ),
    (
        *("CSV, names as in addresses", "boxes.csv", ["images/a b.jpg"], {}),
        {"boxes.csv": CSV_HEADER + "https://host/images/a%20b.jpg,100,80,cat,40,20,60,60\n"},
        {"": {"images/a b.jpg": [YOLO_BOX]}},
    ),
    (
        *("VOC, images of one name in splits", "", ["train/images/a.jpg", "val/images/a.jpg"], {}),
        {"train/annotations/a.xml": VOC, "val/annotations/a.xml": VOC},
        {"train": {"train/images/a.jpg": [YOLO_BOX]}, "val": {"val/images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("CSV, images of one name in splits", "", ["train/images/a.jpg", "val/images/a.jpg"], {}),
        {
            f"{split}/boxes.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n"
            for split in ("train", "val")
        },
        {"train": {"train/images/a.jpg": [YOLO_BOX]}, "val": {"val/images/a.jpg": [YOLO_BOX]}},
    ),
    (
        *("COCO, a file with a byte order mark", "labels.json", ["a.jpg"], {}),
        {"labels.json": b"\xef\xbb\xbf" + json.dumps(coco("a.jpg")).encode()},
        {"": A},
    ),
    (
        *("COCO, paths of Windows in a sub-folder", "labels.json", ["images/a.jpg"], {}),
        {"labels.json": coco("images\\a.jpg")},
        {"": {"images/a.jpg": [YOLO_BOX]}},
    ),
]


# The name; what to register; the files; parts of the message.
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
    (
        *("poses without a number", "data.yaml"),
        {"images/a.jpg": "", "data.yaml": "train: images\nkpt_shape: 17\n" + NAMES},
        ["kpt_shape: 17, flip_idx: None are not the number of keypoints"],
    ),
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
    (
        *("half of the images in splits", ""),
        {"images/train/a.jpg": "", "images/b.jpg": "", "labels/train/a.txt": BOX}
        | {"labels/b.txt": BOX},
        ["1 labelled image(s) are in no folder of a split"],
    ),
    ("VOC without images", "", {"a.xml": VOC}, ["none of the images of 1 XML", "last argument"]),
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
        *(
            "VOC of images that were scaled",
            "",
            {"a.jpg": "", "a.xml": voc(("cat", 1, 1, 9, 9), size=(200, 160))},
        ),
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
        ["a.xml: Annotations/a.jpg may be ", "x/a.jpg", "y/a.jpg"],
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
    (
        *("Supervisely", "", {"meta.json": {"classes": [], "tags": []}}),
        ["Supervisely's, to be exported as COCO"],
    ),
    (
        *("Label Studio's own JSON", "a.json", {"a.json": [{"data": {}, "annotations": []}]}),
        ["Label Studio's own, to be exported as COCO"],
    ),
    (
        *("Label Studio's short JSON", "", {"a.json": [{"annotator": 1, "annotation_id": 1}]}),
        ["Label Studio's short form"],
    ),
    ("Datumaro", "", {"a.json": {"items": [], "infos": {}}}, ["Datumaro's"]),
    ("Labelbox", "", {"a.ndjson": '{"data_row": {}}\n'}, ["a.ndjson is JSON Lines"]),
    (
        *("Vertex AI's JSON Lines", "a.jsonl", {"a.jsonl": '{"imageGcsUri": "gs://x"}\n'}),
        ["JSON Lines, as of Google Vertex AI", "export the data as COCO"],
    ),
    (
        *("TFRecord", "", {"train/x.tfrecord": b"\0", "train/label_map.pbtxt": "item {}"}),
        ["x.tfrecord is TFRecord; export the data as COCO"],
    ),
    (
        *("TFRecord in shards", "", {"x.tfrecord-00000-of-00002": b"\0"}),
        ["is TFRecord; export the data"],
    ),
    ("Hugging Face", "", {"data/x.parquet": b"PAR1"}, ["a table of Hugging Face"]),
    ("an archive in a folder", "", {"x.zip": b"PK"}, ["x.zip is an archive; unpack it"]),
    ("XML of dlib", "a.xml", {"a.xml": "<dataset><images/></dataset>"}, ["dlib's imglab"]),
    ("CVAT's XML in a folder", "", {"a.xml": "<annotations/>", "a.jpg": ""}, ["CVAT's own XML"]),
    (
        *("KITTI", ""),
        {"a.jpg": "", "a.txt": "Car 0.00 0 -1.6 5 1 6 2 1.65 1.67 3.64 -0.65 1.71 46.7 -1.59\n"},
        ["a.txt, line 1 is a label of KITTI, not of YOLO: Car 0.00"],
    ),
    (
        *("DOTA", "", {"a.jpg": "", "a.txt": "1 1 9 1 9 9 1 9 plane 0\n"}),
        ["a.txt, line 1 is a label of DOTA"],
    ),
    (
        *("photographs of iPhones", "", {"a.heic": b"\0\0\0\x18ftypheic", "a.txt": BOX}),
        ["a.heic is not an image in a format that Pillow reads; convert it to PNG or JPEG"],
    ),
    (
        *("VIA, two attributes that may be the class", "a.csv"),
        {
            "a.jpg": "",
            "a.csv": VIA_HEADER + via_row("a.jpg", VIA_RECT, {"animal": "cat", "color": "red"}),
        },
        ["animal, color", "call that one class"],
    ),
    (
        *("VIA, a point", "a.csv"),
        {"a.jpg": "", "a.csv": VIA_HEADER + via_row("a.jpg", {"name": "point", "cx": 1}, {})},
        ["a.csv, line 2 is a point, which has no box"],
    ),
    (
        *("VIA, a region without a class", "a.json"),
        {
            "a.jpg": "",
            "a.json": via("a.jpg", (VIA_RECT, {"class": "cat"}), (VIA_RECT, {"class": " "})),
        },
        ["a.json, a.jpg, region 2 has no class ('class')"],
    ),
    (
        *("VIA, broken cells", "a.csv"),
        {"a.jpg": "", "a.csv": VIA_HEADER + 'a.jpg,7,"{}",1,0,"{""name"":",""\n'},
        ['a.csv, line 2: {"name": is not valid JSON'],
    ),
    (
        *("VIA, the same images twice", ""),
        {
            "a.jpg": "",
            "a.csv": VIA_HEADER + via_row("a.jpg", VIA_RECT, {}),
            "a.json": via("a.jpg", (VIA_RECT, {})),
        },
        ["a.csv", "a.json", "both have a.jpg"],
    ),
    (
        *("VIA without its images", "a.csv", {"a.csv": VIA_HEADER + via_row("x.jpg", {}, {})}),
        ["none of the 1 images has been found"],
    ),
    (
        *("two CSV of the same images", ""),
        {"a.jpg": ""} | {f"{n}.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,60,60\n" for n in "bc"},
        ["b.csv", "c.csv", "both have", "a.jpg"],
    ),
    (
        *("poses with a number too few", "data.yaml"),
        {
            "images/a.jpg": "",
            "labels/a.txt": "1 .5 .5 .2 .5 .5 .5\n",
            "data.yaml": "train: images\nkpt_shape: [1, 3]\n" + NAMES,
        },
        ["a.txt, line 1 has 7 numbers; a box has 5, and each of the 1 keypoints of kpt_shape 3"],
    ),
    (
        *("YOLO, a broken data.yaml", ""),
        {
            "images/a.jpg": "",
            "labels/a.txt": BOX,
            "data.yaml": "train: [images\nnames: [dog, cat\n",
        },
        ["data.yaml is not valid YAML"],
    ),
    (
        *("VOC, an encoding that does not exist", ""),
        {"a.jpg": "", "a.xml": f'<?xml version="1.0" encoding="utf-99"?>{VOC}'},
        ["a.xml is not valid XML"],
    ),
    (
        *("an image without bytes", ""),
        {"a.gif": b"", "a.txt": BOX},
        ["a.gif is empty"],
    ),
    (
        *("YOLO, commas", "", {"a.jpg": "", "a.txt": "1,0.5,0.5,0.2,0.5\n"}),
        ["a.txt, line 1: not all are numbers: 1,0.5,0.5,0.2,0.5; separate them by spaces"],
    ),
    (
        *("CSV with x, y, width, height for corners", "a.csv"),
        {"a.jpg": "", "a.csv": CSV_HEADER + "a.jpg,100,80,cat,40,20,20,40\n"},
        ["1 of 1 boxes end before they begin", "are they x, y, width, height instead"],
    ),
    (
        *("VOC without a single object", "", {"a.jpg": "", "a.xml": voc()}),
        ["none of the 1 image(s) has an object (Pascal VOC XML)"],
    ),
    (
        *("YOLO, all labels empty", "", {"a.jpg": "", "a.txt": "", "classes.txt": "cat"}),
        ["none of the 1 image(s) has an object (YOLO)"],
    ),
    (
        *("detections of COCO", "a.json", {"a.json": [{"image_id": 1, "score": 0.5}]}),
        ["not COCO JSON, but detections, which are no annotations"],
    ),
    (
        *("a label in a gap of the names", "data.yaml"),
        {
            "images/a.jpg": "",
            "labels/a.txt": BOX,
            "data.yaml": "train: images\nnames: {0: dog, 2: cat}\n",
        },
        ["a.txt, line 1: its class is 1, but names has 0, 2"],
    ),
    (
        *("names of classes in one line", "data.yaml"),
        {"images/a.jpg": "", "data.yaml": "train: images\nnames: dog, cat\n"},
        ["names is dog, cat, which is not a file"],
    ),
]
