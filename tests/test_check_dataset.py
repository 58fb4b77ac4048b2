"""tools/check_dataset.py: findings, summary, images and exit codes."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from balanced_d2.utils.errors import report_user_errors

from .conftest import ROOT, load_tool, run_program


@pytest.fixture
def data(tiny_coco, tmp_path):
    """A copy of the tiny dataset: its folder, and a function that writes changed annotations."""
    shutil.copytree(tiny_coco.parent, tmp_path / "data")
    json_file = tmp_path / "data" / "annotations.json"

    def change(changed):
        content = json.loads(json_file.read_text())
        changed(content)
        json_file.write_text(json.dumps(content))

    return tmp_path / "data", change


@pytest.fixture
def check(data, monkeypatch, capsys):
    """Run the tool in this process on the copy; return exit code, standard output and error."""
    folder, _ = data

    def run(*arguments):
        own = ["--register", "own", str(folder / "annotations.json"), str(folder / "images")]
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *arguments, *own])
        tool = load_tool("check_dataset")
        exit_code = report_user_errors(tool.main, tool.parse_args())
        for name in ("own", "function", "yolo"):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
        return (exit_code, *capsys.readouterr())

    return run


def test_good_dataset(check):
    exit_code, out, err = check("own", "--images")
    lines = out.splitlines()
    assert exit_code == 0 and "error" not in err
    assert lines[0] == (
        "data set 'own': 6 images (0 without annotations), 18 usable annotations, 2 classes"
    )
    counts = {line.split()[0]: int(line.split()[1]) for line in lines[2:]}
    assert set(counts) == {"bright", "dark"} and sum(counts.values()) == 18


def test_dropped_boxes_are_reported_once_and_are_no_error(check, data):
    def change(content):
        content["annotations"][0]["bbox"] = [1, 2, 0, 4]
        content["annotations"][1]["bbox"] = [79, 60, 30, 30]
        content["annotations"][2]["bbox"] = [200, 2, 3, 4]

    data[1](change)
    exit_code, out, err = check("own")
    assert exit_code == 0 and "own" not in err
    lines = out.splitlines()
    assert lines[:3] == [
        "data set 'own': dropped 1 annotation(s) whose box has no width or height: "
        "annotation 1 (image 1)",
        "data set 'own': dropped 1 annotation(s) whose box is outside its image: "
        "annotation 3 (image 1)",
        "data set 'own': clipped 1 annotation(s) whose box is partly outside its image: "
        "annotation 2 (image 1)",
    ]
    assert "16 usable annotations" in lines[3]


def test_refused_and_dropped_are_reported_together(check, data):
    def change(content):
        content["annotations"][0]["bbox"] = [1, 2, 0, 4]
        content["annotations"][1]["image_id"] = 99
        content["annotations"][2]["id"] = 5

    data[1](change)
    exit_code, out, err = check("own")
    assert exit_code == 2 and "error: cannot be trained on: own" in err
    assert "numbered 2 annotation(s) whose id is missing or occurs more than once: number 3" in out
    assert "1 annotation(s) belong to no image in the file: annotation 2 (image 99)" in out
    assert "dropped 1 annotation(s)" in out and "annotation 1 (image 1)" in out
    assert "cannot be loaded until" in out


def test_images_of_another_name_and_what_is_left_out(check, data, monkeypatch, capsys):
    folder, change = data
    change(lambda content: content["images"][0].update(file_name="C:\\x\\1.JPG"))
    exit_code, out, err = check("own")
    assert exit_code == 0
    assert f"found by another name 1 image(s): C:\\x\\1.JPG is {folder}/images/1.jpg" in out

    yolo = folder / "yolo"
    shutil.copytree(folder / "images", yolo)
    (yolo / "1.txt").write_text("0 .5 .5 .1 .1")
    (yolo / "z.txt").write_text("0 .5 .5 .1 .1")
    monkeypatch.setattr(sys, "argv", ["check_dataset.py", "--register", "yolo", str(yolo)])
    tool = load_tool("check_dataset")
    assert report_user_errors(tool.main, tool.parse_args()) == 0
    assert (
        f"'yolo': left out 1 text file(s) without an image: {yolo}/z.txt" in capsys.readouterr()[0]
    )


@pytest.mark.parametrize(
    "body, error",
    [
        ("[print('x' * 99) for _ in range(10000)]", ""),
        ("print('x')", ""),  # which is written at the end only
        ("print('x'); raise UserError('wrong')", "error: wrong\n"),
        ("print('x' * 99999)", ""),  # more than the buffer takes
    ],
)
def test_output_that_nobody_reads(body, error, monkeypatch):
    """As after ``| head``: no command shows a traceback then."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    result = run_without_reader(body)
    assert (result.returncode, result.stderr) == (1, error)


def test_another_pipe_that_breaks_is_no_secret():
    result = run_without_reader("raise BrokenPipeError('of a worker')", stdout=subprocess.PIPE)
    assert "BrokenPipeError: of a worker" in result.stderr and result.returncode == 1


def test_a_process_without_standard_output():
    """As of a service: there is nothing to flush."""
    program = (
        "import os, sys; from balanced_d2.utils.errors import *\n"
        "sys.stdout = None\n"
        "os._exit(report_user_errors(print, 'x'))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert result.returncode == 0 and not result.stderr


def run_without_reader(body, **kwargs):
    """The end of a process whose program has this body, its standard output a broken pipe."""
    program = (
        "import sys; from balanced_d2.utils.errors import *\n"
        f"def main(): {body}\n"
        "sys.exit(report_user_errors(main))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            **{"stdout": writer, **kwargs},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)


def test_crowds_are_not_usable(check, data):
    data[1](lambda content: [a.update(iscrowd=int(a["id"] > 2)) for a in content["annotations"]])
    exit_code, out, err = check("own")
    assert exit_code == 0 and "6 images (0 without annotations), 2 usable annotations" in out
    assert "left out 16 annotation(s) that are marked iscrowd" in out


def test_broken_file(check, data):
    (data[0] / "annotations.json").write_text("[")
    exit_code, out, err = check("own")
    assert exit_code == 2 and "cannot be trained on: own" in err
    assert "refused: data set 'own'" in out and "not a valid annotation file" in out


def test_images(check, data):
    images = data[0] / "images"
    (images / "1.jpg").unlink()
    (images / "2.jpg").write_text("no image")
    whole = (images / "3.jpg").read_bytes()
    (images / "3.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    cv2.imwrite(str(images / "4.jpg"), np.zeros((64, 81, 3), np.uint8))
    # Stored on its side, as its EXIF data says: Detectron2 reads it with the right size.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 80)).save(images / "5.jpg", exif=exif)
    exit_code, out, err = check("own")
    assert exit_code == 2
    assert f"1 image file(s) do not exist: {images}/1.jpg; refused" in out
    # What headers say.
    assert f"{images}/2.jpg (it is not an image" in out and "4.jpg (is 81 x 64, not" in out
    assert out.count("1.jpg") == 1 and "3.jpg" not in out and "5.jpg" not in out
    exit_code, out, err = check("own", "--images")
    assert exit_code == 2
    (line,) = [line for line in out.splitlines() if "image(s) cannot be trained on" in line]
    assert "4 image(s)" in line and "5.jpg" not in line and "6.jpg" not in line
    assert f"{images}/1.jpg (does not exist)" in line
    assert f"{images}/2.jpg (it is not an image" in line
    assert f"{images}/3.jpg (image file is truncated" in line
    assert f"{images}/4.jpg (is 81 x 64, not 80 x 64)" in line


def test_dataset_of_a_function(check):
    """A dataset without a file, whose records are checked directly."""
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 0}
    records = [
        {"file_name": "a.jpg", "width": 9, "height": 9, "annotations": [box]},
        {"file_name": "b.jpg", "width": 9, "height": 9, "annotations": [{**box, "category_id": 3}]},
    ]
    DatasetCatalog.register("function", lambda: records)
    MetadataCatalog.get("function").set(thing_classes=["thing"])
    exit_code, out, err = check("own", "function")
    assert exit_code == 2 and "error: cannot be trained on: function" in err
    assert "data set 'function': 1 annotation(s)" in out
    assert "annotation number 1 of b.jpg (category_id 3)" in out
    assert "data set 'own': 6 images" in out


def test_errors_stay_on_one_line(check):
    exit_code, out, err = check("own", "--register", "x", "of two\nlines")
    assert exit_code == 2 and err.splitlines() == [
        "error: --register x: of two lines does not exist"
    ]


def test_unknown_name(check):
    exit_code, out, err = check("own", "nowhere")
    assert exit_code == 2 and "'nowhere' is not registered" in err and not out


def test_a_path_instead_of_a_name(check, tiny_coco):
    exit_code, out, err = check("own", str(tiny_coco))
    assert exit_code == 2 and f"--register my {tiny_coco} gives it the name my" in err and not out


@pytest.mark.slow
def test_as_a_program(tiny_coco):
    result = run_program(
        *("tools/check_dataset.py", "tiny", "--register", "tiny", tiny_coco),
        tiny_coco.parent / "images",
    )
    assert result.returncode == 0 and result.stderr == ""
    assert "data set 'tiny': 6 images" in result.stdout
