"""demo.py on the trained demo: images, folders, videos, JSON, and mistakes."""

import json
import math
import os

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from balanced_d2 import load_config
from balanced_d2.visualization import as_records

from .conftest import DEMO_CONFIG, assert_user_error, run_program


@pytest.fixture(autouse=True)
def datasets(demo, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo / "datasets"))


@pytest.fixture
def images(demo):
    return sorted((demo / "datasets" / "balanced_shapes" / "val").iterdir())


@pytest.fixture
def detect(run_here, demo):
    """Run demo.py with the trained demo; the options come last, as in the usage."""

    def run(*arguments, opts=()):
        weights = ("MODEL.WEIGHTS", demo / "output" / "model_final.pth")
        return run_here("demo.py", "--config-file", DEMO_CONFIG, *arguments, *weights, *opts)

    return run


def expected_detections(demo, image, threshold):
    """The model's boxes and scores, without Detectron2's predictor."""
    cfg = load_config(DEMO_CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    model = build_model(cfg).eval()
    checkpoint = torch.load(demo / "output" / "model_final.pth", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    array = read_image(str(image), format="BGR")  # it has the demo's test size
    with torch.no_grad():
        (output,) = model([{"image": torch.from_numpy(array.transpose(2, 0, 1).copy())}])
    detections = output["instances"]
    return detections[detections.scores > threshold]


@pytest.mark.slow
def test_as_a_program(demo, images, tmp_path):
    """In a process of its own, on a folder, with --input directly before the options."""
    folder = tmp_path / "images"
    folder.mkdir()
    for image in images[:3]:
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "notes.txt").write_text("no image")
    output = tmp_path / "new" / "pictures"
    result = run_program(
        *("demo.py", "--config-file", DEMO_CONFIG, "--output", output, "--json"),
        *("--confidence-threshold", "0.1", "--input", folder),
        *("MODEL.WEIGHTS", demo / "output" / "model_final.pth"),
    )
    assert result.returncode == 0, result.stderr
    assert "3 of 3 input(s)" in result.stdout
    assert "detecting" not in result.stderr  # no bar outside a terminal
    names = {image.name for image in images[:3]}
    assert {path.name for path in output.glob("*.jpg")} == names
    for name in names:
        before, after = (cv2.imread(str(path / name)) for path in (folder, output))
        assert before.shape == after.shape and np.abs(before.astype(int) - after).max() > 50
    number = 0
    for image in images[:3]:
        record = json.loads((output / f"{image.stem}.json").read_text())
        assert record["image"] == str(folder / image.name)
        assert (record["height"], record["width"]) == (128, 160)
        expected = expected_detections(demo, image, 0.1)
        detections = record["detections"]
        boxes = torch.tensor([d["bbox"] for d in detections]).reshape(-1, 4)
        torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=1e-3)
        scores = torch.tensor([d["score"] for d in detections])
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-5)
        classes = ("disk", "square", "triangle", "ring", "cross")
        assert [d["class"] for d in detections] == [classes[i] for i in expected.pred_classes]
        number += len(detections)
    assert number > 0 and f"{number} detection(s)" in result.stdout


def test_names_of_pictures(detect, images, demo, tmp_path):
    """Images of the same name get a number, and no image is replaced by its picture."""
    train = demo / "datasets" / "balanced_shapes" / "train"
    other = train / images[0].name
    png = tmp_path / "image.png"
    cv2.imwrite(str(png), cv2.imread(str(images[0])))
    output = tmp_path / "pictures"
    pattern = images[0].with_name("000001.*")
    assert detect("--input", pattern, other, png, "--output", output).returncode == 0
    names = {path.name for path in output.iterdir()}
    assert names == {images[0].name, f"{images[0].stem}_2.jpg", "image.png"}
    before = images[0].read_bytes()
    assert_user_error(
        detect("--input", images[0], "--output", images[0].parent), "would be replaced"
    )
    assert images[0].read_bytes() == before


def write_video(path, images, size=(160, 128)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, size)
    for image in images:
        writer.write(cv2.imread(str(image)))
    writer.release()
    return path


def test_video(detect, images, demo, tmp_path):
    video = write_video(tmp_path / "clip.avi", images[:4])
    result = detect("--input", video, "--output", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 4 and drawn.get(cv2.CAP_PROP_FPS) == 5
    success, frame = drawn.read()
    assert success and frame.shape == (128, 160, 3)
    content = json.loads((tmp_path / "out" / "clip.json").read_text())
    assert content["fps"] == 5 and [f["frame"] for f in content["frames"]] == [0, 1, 2, 3]
    read = cv2.VideoCapture(str(video))
    for record in content["frames"]:
        cv2.imwrite(str(tmp_path / "frame.png"), read.read()[1])
        expected = expected_detections(demo, tmp_path / "frame.png", 0.5)
        scores = torch.tensor([d["score"] for d in record["detections"]])
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)


def test_an_unreadable_input_does_not_stop_the_others(detect, images, tmp_path):
    for name in ("broken.jpg", "broken.mp4"):
        (tmp_path / name).write_text("no image")
    inputs = [tmp_path / "broken.jpg", images[0], tmp_path / "broken.mp4"]
    inputs.append(write_video(tmp_path / "clip.avi", images[:1]))
    inputs[3] = inputs[3].rename(tmp_path / os.fsdecode(b"\xff.avi"))
    result = detect("--input", *inputs, "--output", tmp_path / "out")
    assert_user_error(
        result,
        f"cannot read the image {inputs[0]}",
        f"cannot read the video {inputs[2]}",
        "whose name is not UTF-8",
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [images[0].name]
    assert "1 of 4 input(s)" in result.stdout


MISTAKES = {
    "no such image": (["--input", "nowhere.jpg"], ["no file or folder nowhere.jpg"]),
    "empty folder": (["--input", "{tmp}"], ["no image or video in the folder"]),
    "threshold": (
        ["--input", "{image}", "--confidence-threshold", "50"],
        ["--confidence-threshold is 50.0"],
    ),
    "another model": (
        ["--input", "{image}", "MODEL.FPN.OUT_CHANNELS", "32"],
        ["MODEL.WEIGHTS", "has shape"],
    ),
    "unknown key": (["--input", "{image}", "MODEL.WEIGHT", "x"], ["did you mean MODEL.WEIGHTS?"]),
    "no such webcam": (["--webcam"], ["no webcam that can be opened"]),
}


@pytest.mark.parametrize("arguments, parts", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(detect, images, tmp_path, arguments, parts):
    if "--webcam" in arguments and cv2.VideoCapture(0).isOpened():
        pytest.skip("this machine has a webcam")
    places = {"tmp": tmp_path, "image": images[0]}
    arguments = [argument.format(**places) for argument in arguments]
    result = detect("--output", tmp_path / "out", *arguments)
    assert_user_error(result, *parts)
    assert not list((tmp_path / "out").glob("*"))


def test_without_a_screen(detect, images, monkeypatch, run_here, tmp_path):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert_user_error(detect("--input", images[0]), "no screen", "--output DIR")
    assert_user_error(detect("--input", images[0], "--json"), "--json", "--output")
    monkeypatch.setenv("DISPLAY", ":7")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:                  NONE\n")
    assert_user_error(detect("--input", images[0]), "opens no windows", "--output DIR")
    lazy = "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.py"
    arguments = ("--config-file", lazy, "--input", images[0], "--output", tmp_path)
    assert_user_error(run_here("demo.py", *arguments), "needs a YAML config")
    arguments = ("--config-file", DEMO_CONFIG, "--input", images[0], "--output", tmp_path)
    assert_user_error(run_here("demo.py", *arguments), "nothing to draw", "MODEL.WEIGHTS")


def test_records_with_masks_and_keypoints():
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 20.0, 30.0, 35.0]]))
    found.scores, found.pred_classes = torch.tensor([0.75]), torch.tensor([1])
    found.pred_masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    found.pred_masks[0, 20:35, 10:30] = True
    found.pred_keypoints = torch.tensor([[[12.0, 22.0, 0.9], [28.0, 33.0, 0.1]]])
    (record,) = as_records(found, ["a", "b"])
    (polygon,) = record.pop("segmentation")
    x, y = np.array(polygon).reshape(-1, 2).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area == pytest.approx(19 * 14)  # through the centres of the outermost pixels
    keypoints = record.pop("keypoints")
    assert np.allclose(keypoints, [[12, 22, 0.9], [28, 33, 0.1]])
    assert record == {"bbox": [10, 20, 30, 35], "class": "b", "class_id": 1, "score": 0.75}
    assert math.isclose(json.loads(json.dumps(record))["score"], 0.75)
