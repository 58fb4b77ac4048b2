"""Datasets in other formats than COCO JSON: what is recognised, what is read, what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from balanced_d2 import load_config
from balanced_d2.data.checks.coco_file import check_coco
from balanced_d2.data.checks.for_model import check_datasets, load
from balanced_d2.data.checks.records import report
from balanced_d2.data.datasets import coco_files, source
from balanced_d2.data.datasets.register import register_source
from balanced_d2.utils.arguments import DOTTED_KEY, split_at_key
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_MODEL, assert_user_error, logged, run_program, train_net
from .formats_table import (
    BOX,
    CSV_HEADER,
    READ,
    REFUSED,
    ROBOFLOW,
    ROBOFLOW_LABELS,
    SIZE,
    VIA_RECT,
    VOC,
    YOLO_BOX,
    coco,
    via,
    voc,
)

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
IMAGES = (".jpg", ".JPG", ".jpeg", ".png", ".tif", ".bmp", ".webp")


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


def test_size_of_the_table():
    names = [row[0] for row in (*READ, *REFUSED)]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("layout", READ, ids=[layout[0] for layout in READ])
def test_what_is_read(tmp_path, layout):
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


@pytest.mark.parametrize("case", REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_refused(tmp_path, case):
    _, path, files, parts = case
    write(tmp_path, **files)
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


def test_poses(tmp_path):
    yaml = "train: images\nkpt_shape: [3, {}]\nflip_idx: [0, 2, 1]\nkpt_names:\n  0: [nose, l, r]\n"
    for size, points in ((3, "0.45 0.5 2 0.5 0.25 1 0 0 0"), (2, "0.45 0.5 0.5 0.25 0 0")):
        folder = tmp_path / str(size)
        write(folder, "images/a.jpg", **{"labels/a.txt": f"1 0.5 0.5 0.2 0.5 {points}\n"})
        write(folder, **{"data.yaml": yaml.format(size) + "names: [dog, cat]\n"})
        register_source(f"pose{size}", str(folder))
        (annotation,) = load(f"pose{size}_train")[0]["annotations"]
        hidden = 1 if size == 3 else 2
        # As of every COCO file, half a pixel is added: Detectron2's are not indices of pixels.
        expected = [45.5, 40.5, 2, 50.5, 20.5, hidden, 0.5, 0.5, 0]
        assert annotation["keypoints"] == pytest.approx(expected)
        assert annotation["bbox"] == pytest.approx([40, 20, 20, 40])
        metadata = MetadataCatalog.get(f"pose{size}_train")
        assert metadata.keypoint_names == ["nose", "l", "r"]
        assert metadata.keypoint_flip_map == [("l", "r")]


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


def test_images_in_two_splits_are_reported(tmp_path, caplog):
    """As in Ultralytics' first example."""
    write(tmp_path, "images/a.jpg", "images/b.jpg", **{"labels/a.txt": BOX})
    write(tmp_path, **{"t.txt": "images/a.jpg\nimages/b.jpg", "v.txt": "images/a.jpg"})
    write(tmp_path, **{"data.yaml": "train: t.txt\nval: v.txt\nnames: [dog, cat]\n"})
    found = read("twice", tmp_path)
    assert {split: len(images) for split, images in found.items()} == {"train": 2, "val": 1}
    assert f"1 image(s) are in more than one split: {tmp_path}/images/a.jpg" in caplog.text


def test_messages_name_what_was_registered(tmp_path, caplog):
    """And no file that was written only for evaluators."""
    write(tmp_path, "a.jpg", **{"a.txt": BOX + "1 0.5 0.5 0 0\n", "classes.txt": "dog\ncat"})
    register_source("named", str(tmp_path))
    with caplog.at_level("INFO"):
        load("named")
    assert f"{tmp_path}: dropped 1 annotation(s) whose box has no width or height" in caplog.text
    assert MetadataCatalog.get("named").json_file not in caplog.text


def test_links_and_pipes(tmp_path):
    """Links are followed, each once; what is no file is not opened."""
    write(tmp_path, "store/a.jpg", **{"set/labels/a.txt": BOX, "set/classes.txt": "dog\ncat"})
    (tmp_path / "set" / "images").symlink_to("../store")
    (tmp_path / "store" / "loop").symlink_to("../set")
    os.mkfifo(tmp_path / "set" / "boxes.csv")
    assert read("links", tmp_path / "set") == {"": {"../store/a.jpg": [("cat", 40, 20, 20, 40)]}}
    (tmp_path / "store" / "b.jpg").symlink_to("gone")
    assert register_source("dead", str(tmp_path / "set")) == ["dead"]
    (why,) = MetadataCatalog.get("dead").unreadable
    assert why.endswith("b.jpg does not exist")


def test_images_outside_of_a_link(tmp_path, caplog):
    """What is beside the link is not beside the folder that it leads to."""
    write(tmp_path, "data/images/a.jpg", **{"data/labels/a.txt": BOX, "disk/far/data/a.txt": ""})
    write(tmp_path, "disk/far/data/images/a.jpg")  # of something else
    path = f"path: {tmp_path}/data\ntrain: images\nnames: [dog, cat]\n"
    write(tmp_path, **{"disk/far/config/data.yaml": path})
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "far" / "config")
    (name,) = register_source("linked", str(tmp_path / "link"))
    (record,) = load(name)
    assert os.path.samefile(record["file_name"], tmp_path / "data" / "images" / "a.jpg")
    assert "another name" not in caplog.text
    # Links around all of it change no name, by which --split divides.
    (tmp_path / "around").symlink_to(tmp_path / "disk")
    write(tmp_path, **{"disk/far/config/data.yaml": "path: ../data\ntrain: images\nnames: [x]\n"})
    write(tmp_path, **{"disk/far/data/labels/a.txt": BOX.replace("1", "0", 1)})
    for folder in ("disk", "around"):
        (name,) = register_source(folder, str(tmp_path / folder / "far" / "config"))
        content = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
        assert [image["file_name"] for image in content["images"]] == ["../data/images/a.jpg"]


def test_images_without_a_size_that_cannot_be_read(tmp_path, run_here, caplog):
    """Refused, or left out by DATALOADER.SKIP_BAD_IMAGES; the split is that with them."""
    write(tmp_path, *(f"images/{i}.jpg" for i in range(9)))
    write(tmp_path, **{f"labels/{i}.txt": BOX for i in range(9)}, **{"classes.txt": "dog\ncat"})
    splits = {split: set(images) for split, images in read("good", tmp_path, fraction=0.4).items()}
    (tmp_path / "images" / "4.jpg").write_text("no image")
    (tmp_path / "images" / "5.jpg").write_bytes(b"")
    bad = {"images/4.jpg", "images/5.jpg"}
    found = read("bad", tmp_path, fraction=0.4)
    assert {split: set(images) for split, images in found.items()} == {
        split: images - bad for split, images in splits.items()
    }
    assert f"left out 2 image(s): {tmp_path}/images/" in caplog.text
    for split, images in splits.items():
        cfg = load_config("", ["DATASETS.TRAIN", f"('bad_{split}',)"])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        if images & bad:
            message = rf"{len(images & bad)} image\(s\) cannot be read: "
            with pytest.raises(UserError, match=message):
                check_datasets(cfg)
        cfg.DATALOADER.SKIP_BAD_IMAGES = True
        check_datasets(cfg)
    result = run_here("tools/check_dataset.py", "--register", "checked", tmp_path)
    assert_user_error(result, "cannot be trained on: checked")
    assert "2 image(s) cannot be read: " in result.stdout
    assert f"{tmp_path}/images/5.jpg is empty; refused: add, replace or remove" in result.stdout
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 9 image\(s\) can be read: .* is empty; "):
        register_source("none", str(tmp_path))


def test_an_image_of_voc_without_a_size_that_does_not_exist(tmp_path, caplog):
    """As in other formats: it is left out of the data, and refused where these are used."""
    write(tmp_path, "a.jpg", **{"a.xml": VOC, "b.xml": voc(name="b (1).jpg", size=(0, 0))})
    assert list(read("without", tmp_path)[""]) == ["a.jpg"]
    assert f"left out 1 image(s): {tmp_path}/b (1).jpg does not exist" in caplog.text
    assert MetadataCatalog.get("without").unreadable == [f"{tmp_path}/b (1).jpg does not exist"]


def test_numbers_as_classes(tmp_path):
    """They are sorted as numbers."""
    rows = "".join(f"a.jpg,100,80,{label},40,20,60,60\n" for label in (10, 2, 0))
    write(tmp_path, "a.jpg", **{"boxes.csv": CSV_HEADER + rows})
    register_source("numbers", str(tmp_path))
    load("numbers")
    assert MetadataCatalog.get("numbers").thing_classes == ["0", "2", "10"]


def test_words_of_the_config():
    for words, taken in (
        (["a", "b.yaml", "SOLVER.MAX_ITER", "2"], 2),
        (["a", "TRAIN", "OUTPUT_DIR", "x"], 2),
        (["a", "b.json", "images/", "SEED", "1"], 3),
        (["a", "b.json", "images", "train.max_iter=2"], 3),
        (["a", "b"], 2),
    ):
        assert split_at_key(words, start=2) == (words[:taken], words[taken:])
    names = ["plain", "OHEM", "SOLVER.MAX_ITER", "2"]
    assert split_at_key(names, key=DOTTED_KEY) == (names[:2], names[2:])


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


def test_a_split_does_not_depend_on_where_the_images_are(tmp_path):
    rows = "".join(f"{i}.jpg,100,80,cat,40,20,60,60\n" for i in range(9))
    write(tmp_path, **{"boxes/boxes.csv": CSV_HEADER + rows})
    chosen = []
    for folder in ("boxes/images", "elsewhere/in/a/folder"):
        write(tmp_path, *(f"{folder}/{i}.jpg" for i in range(9)))
        found = read(folder, tmp_path / "boxes" / "boxes.csv", tmp_path / folder, fraction=0.4)
        chosen.append(sorted(map(os.path.basename, found["val"])))
    assert chosen[0] == chosen[1] and len(chosen[0]) == 4


def test_images_without_a_label_file_are_reported(tmp_path, caplog):
    """Once, also if they are in two splits; what is labelled as empty is not."""
    write(tmp_path, *(f"images/{i}.jpg" for i in range(4)))
    write(tmp_path, **{"labels/0.txt": BOX, "labels/1.txt": ""})
    write(tmp_path, **{"data.yaml": "train: images\nval: images\nnames: [dog, cat]\n"})
    assert len(read("background", tmp_path)["train"]) == 4
    line = "2 image(s) have no label file, and so no object in them"
    assert f"{line}: {tmp_path}/images/2.jpg; {tmp_path}/images/3.jpg" in caplog.text


@pytest.mark.parametrize("names", [("a.jpg", "old/a.jpg"), ("old/a.jpg", "a.jpg")])
def test_an_image_that_is_missing_does_not_become_another(tmp_path, names):
    """In whatever order, if there is one of its file name that is also named itself."""
    rows = "".join(f"{name},100,80,cat,1,2,30,40\n" for name in names)
    write(tmp_path, "images/a.jpg", **{"a.csv": CSV_HEADER + rows})
    with pytest.raises(UserError, match=r"a.csv, line 3: there is no image old/a.jpg, and .* a.jp"):
        register_source("lost", str(tmp_path / "a.csv"), str(tmp_path / "images"))
    both = CSV_HEADER + rows.replace("old/", "./")  # two ways to write one path
    write(tmp_path, **{"b.csv": both})
    found = read("two", tmp_path / "b.csv", tmp_path / "images")
    assert {image: len(boxes) for image, boxes in found[""].items()} == {"images/a.jpg": 2}


@pytest.mark.parametrize("path", ["a.csv", "./a.csv", "."])
def test_names_are_exact_in_the_current_folder(tmp_path, monkeypatch, path):
    """An image of the same name in a folder is another one."""
    rows = "1.jpg,100,80,cat,1,2,30,40\nold/1.jpg,100,80,dog,1,2,30,40\n"
    write(tmp_path, "1.jpg", "old/1.jpg", **{"a.csv": CSV_HEADER + rows})
    monkeypatch.chdir(tmp_path)
    box = (1, 2, 29, 38)
    assert read("here", path)[""] == {"1.jpg": [("cat", *box)], "old/1.jpg": [("dog", *box)]}


def test_paths_of_another_machine_are_looked_up_once(tmp_path, monkeypatch):
    """On network drives, each look-up takes its time."""
    files = [str(tmp_path / f"images/{video}/{i}.jpg") for video in "ab" for i in range(9)]
    index, asked = source.ImageIndex(files, str(tmp_path / "images")), []
    monkeypatch.setattr(os.path, "isfile", lambda path: asked.append(path))
    names = [f"/mnt/old/{video}/{i}.jpg" for video in "ab" for i in range(9)]
    assert [index.find(name, str(tmp_path / "boxes"), "a.csv") for name in names] == files
    assert asked == names


def test_the_image_folder_of_a_yolo_config_comes_first(tmp_path):
    """And the names of the classes are still those beside the config."""
    for folder in ("near", "near/old", "given"):
        write(tmp_path / folder, "images/a.jpg", **{"labels/a.txt": BOX})
    files = {"near/data.yaml": "train: old/images\nnames: n.txt\n", "near/n.txt": "dog\ncat\n"}
    write(tmp_path, **files, **{"given/n.txt": "cat\ndog\n"})
    found = read("first", tmp_path / "near" / "data.yaml", tmp_path / "given")
    assert found == {"train": {"../given/images/a.jpg": [YOLO_BOX]}}


@pytest.mark.parametrize("is_project", [False, True])
def test_json_of_others_with_the_folder_of_its_images(tmp_path, is_project):
    """It is not COCO's because of its ending; and its own name says no split."""
    content = via("a.jpg", (VIA_RECT, {"name": "cat"}))
    if is_project:
        content = {"_via_settings": {}, "_via_img_metadata": content}
    labelme = {"version": "5", "shapes": [], "imagePath": "a.jpg"}
    write(tmp_path, "images/a.jpg", **{"train.json": content, "a.json": labelme})
    found = read("via", tmp_path / "train.json", tmp_path / "images")
    assert found == {"": {"images/a.jpg": [YOLO_BOX]}}
    with pytest.raises(UserError, match=r"a.json is not COCO JSON, but LabelMe's"):
        register_source("labelme", str(tmp_path / "a.json"), str(tmp_path / "images"))


def test_coco_with_the_folder_of_its_images_is_not_read_before_it_is_used(tmp_path):
    """Whatever is wrong with it."""
    write(tmp_path, **{"a.json": '{"images": [', "b.json": "{", "images/a.jpg": ""})
    write(tmp_path, **{"c.json": {"annotations": [], "images": []}})
    for name in ("a.json", "b.json", "c.json", "gone.json"):
        assert register_source(name, str(tmp_path / name), str(tmp_path / "images")) == [name]


def test_large_coco_files_are_not_parsed_twice(tmp_path, monkeypatch):
    """Whatever comes first in them: that would take minutes and gigabytes for each process."""
    content = coco("a.jpg")
    content["annotations"] *= 3000
    content = {key: content[key] for key in ("annotations", "categories", "images")}
    write(tmp_path, "images/a.jpg", **{"a.json": content, "empty.json": ""})
    monkeypatch.setattr(coco_files, "json_content", lambda path: pytest.fail(f"parses {path}"))
    for name in ("a.json", "empty.json"):
        assert register_source(name, str(tmp_path / name), str(tmp_path / "images")) == [name]


def test_splits_of_coco_with_the_folder_of_the_images(tmp_path):
    write(tmp_path, "pics/train/a.jpg", "pics/images/val/b.jpg")
    write(tmp_path, **{"boxes/train.json": coco("a.jpg"), "boxes/val.json": coco("b.jpg")})
    found = read("apart", tmp_path / "boxes", tmp_path / "pics")
    assert found == {
        "train": {"../pics/train/a.jpg": [YOLO_BOX]},
        "val": {"../pics/images/val/b.jpg": [YOLO_BOX]},
    }


@pytest.mark.parametrize("wrong", [None, [1], {}])
def test_split_of_coco_with_a_wrong_id(tmp_path, wrong):
    """It is divided like any other, and refused where it is used."""
    content = coco(*(f"{i}.jpg" for i in range(5)))
    content["images"][2]["id"] = wrong
    write(tmp_path, *(f"{i}.jpg" for i in range(5)), **{"all.json": content})
    names = register_source("wrong", str(tmp_path / "all.json"), fraction=0.4)
    with pytest.raises(UserError, match="'wrong_.*: 1 image.s. have no valid id"):
        for name in names:
            findings = check_coco(name, MetadataCatalog.get(name).json_file)
            report(name, [finding for finding in findings if finding.refused])


def test_split_of_coco(tmp_path):
    """With the folder of the images and without."""
    write(tmp_path, *(f"images/{i}.jpg" for i in range(5)))
    content = coco(*(f"{i}.jpg" for i in range(5)))
    for image in content["images"]:
        image["unreadable"] = False  # a field of the user's own
    write(tmp_path, **{"all.json": content})
    found = read("one", tmp_path / "all.json", tmp_path / "images", fraction=0.4)
    assert found == read("two", tmp_path / "all.json", fraction=0.4)
    assert {split: len(images) for split, images in found.items()} == {"train": 3, "val": 2}
