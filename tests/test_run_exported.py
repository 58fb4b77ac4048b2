"""The runner of exported files on many images: folders, videos, batches, threads, engines.

The model is a toy that a failure of the runner cannot hide in: it detects one box, the first four
red values of an image plus (0, 0, 5, 5), with the mean of all values as its score.
"""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image

from balanced_d2 import export
from balanced_d2.export import run_exported

from .conftest import TINY_CONFIG, assert_user_error, run_program
from .test_export import METADATA

RUNNER = run_exported.__file__


def toy(path, **changes):
    def constant(name, *values):
        return onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values)

    def node(kind, inputs, output, **attributes):
        return onnx.helper.make_node(kind, inputs, [output], **attributes)

    def value(name, kind, *shape):
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    floats, integers = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    size = onnx.helper.make_tensor("size", floats, [4], [0.0, 0.0, 5.0, 5.0])
    white = onnx.helper.make_tensor("white", floats, [], [255.0])
    one = onnx.helper.make_tensor("value", integers, [1], [1])
    nodes = [
        node("Slice", ["images", "from", "to", "axes"], "boxes4"),
        node("Squeeze", ["boxes4", "channel"], "colors"),
        node("Add", ["colors", "size"], "boxes"),
        node("ReduceMean", ["images"], "means4", axes=[1, 2, 3], keepdims=1),
        node("Squeeze", ["means4", "last"], "means"),
        node("Div", ["means", "white"], "scores"),
        node("Shape", ["images"], "number", start=0, end=1),
        node("ConstantOfShape", ["number"], "num_detections", value=one),
        node("Shape", ["scores"], "slots"),
        node("ConstantOfShape", ["slots"], "classes", value=one),
    ]
    outputs = [
        value("num_detections", integers, "n"),
        value("boxes", floats, "n", 1, 4),
        value("scores", floats, "n", 1),
        value("classes", integers, "n", 1),
    ]
    constants = [
        *(constant("from", 0, 0, 0), constant("to", 1, 1, 4), constant("axes", 1, 2, 3)),
        *(constant("channel", 1), constant("last", 2, 3), size, white),
    ]
    graph = onnx.helper.make_graph(
        nodes, "toy", [value("images", floats, "n", 3, "h", "w")], outputs, constants
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    described = {
        "format": "onnx-batch",
        "format_version": 2,
        "outputs": [output.name for output in outputs],
        "class_names": ["a", "b"],
        "input_format": "RGB",
        "min_size": 0,
        "max_size": 0,
        **changes,
    }
    onnx.helper.set_model_props(model, {"balanced_d2.json": json.dumps(described)})
    onnx.save(model, str(path))
    return path


@pytest.fixture
def inputs(tmp_path):
    """A folder of images of two sizes, some of them deeper, one of them bad, and a video."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for i in range(7):
        size = (30, 20) if i % 3 else (24, 28)
        pixels = np.full((*size[::-1], 3), 30 * i, np.uint8)
        pixels[0, :4, 0] = 1, 2, 9 + i, 11
        path = folder / "deeper" / f"{i}.png" if i > 4 else folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
    (folder / "2b.jpg").write_text("not an image")
    (folder / "notes.txt").write_text("no image, and not asked for")
    writer = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 5, (32, 32))
    for i in range(5):
        writer.write(np.full((32, 32, 3), (200, 100, 5 * i), np.uint8))  # blue, green, red
    writer.release()
    return folder


def records(result):
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def test_folders_videos_batches_and_threads(inputs, run_here, tmp_path):
    model = toy(tmp_path / "model.onnx")
    together = run_here(
        *(RUNNER, model, inputs, "--batch-size", "3", "--threads", "2", "--threshold", "0"),
        *("--output", tmp_path / "out"),
    )
    found = records(together)
    assert together.returncode == 2
    error, done = together.stderr.splitlines()
    assert "cannot read image" in error and "2b.jpg: it is not an image in a format" in error
    assert done.startswith("done: 12 image(s) in ") and " a second; 1 failed" in done
    names = [(line["image"].rsplit("/", 1)[1], line.get("frame")) for line in found]
    assert names == [
        *((f"{i}.png", None) for i in range(5)),
        *(("clip.avi", i) for i in range(5)),
        *((f"{i}.png", None) for i in (5, 6)),
    ]
    for line in found:
        (detection,) = line["detections"]
        if "frame" in line:
            left = 5 * line["frame"]
            assert detection["bbox"] == pytest.approx([left, left, left + 5, left + 5], abs=2)
            continue
        i = int(line["image"][-5])
        assert detection["bbox"] == [1, 2, 9 + i + 5, 11 + 5] and detection["class"] == "b"
        assert detection["score"] == pytest.approx(30 * i / 255, abs=0.02)
        assert (line["height"], line["width"]) == ((20, 30) if i % 3 else (28, 24))

    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"detections.jsonl", "clip.mp4", *(f"{i}.png" for i in range(7))}
    clip = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert clip.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and clip.get(cv2.CAP_PROP_FPS) == 5
    _, frame = clip.read()
    assert frame[-1, -1] == pytest.approx([200, 100, 0], abs=25)

    one_by_one = run_here(RUNNER, model, inputs, "--threshold", "0")
    assert records(one_by_one) == found and one_by_one.returncode == 2


def test_images_of_one_size_go_through_the_model_together(inputs, tmp_path, monkeypatch):
    detector = run_exported.ExportedDetector(str(toy(tmp_path / "model.onnx")))
    items, number = listed(inputs)
    assert number is None  # of a video it is not known
    sizes, model = [], detector._run
    detector._run = lambda images: sizes.append(images.shape) or model(images)
    monkeypatch.setattr(run_exported.statistics, "median", lambda seconds: 60)
    items = list(items)
    results = run_exported.detect_in(detector, items, repeat=0)
    assert sorted(shape[0] for shape in sizes) == [3, 4, 5] and len(set(sizes)) == 3
    (bad,) = (i for i, r in enumerate(results) if isinstance(r, run_exported.UserError))
    assert items.pop(bad).path.endswith("2b.jpg") and "2b.jpg" in str(results.pop(bad))
    for item, result in zip(items, results):  # in their order, whatever went together
        red = 5 * item.frame if item.frame is not None else 9 + int(item.path[-5])
        assert result.outputs["boxes"][0, 2] == pytest.approx(red + 5, abs=2)
        together = {(24, 28): 3, (30, 20): 4, (32, 32): 5}[result.array.shape[1:][::-1]]
        assert result.seconds == 60 / together


@pytest.mark.parametrize(
    "error, message",
    [
        (run_exported.UserError("too small"), "too small"),
        (RuntimeError("a line\nothers"), "the model does not take 5 image(s) of 32 x 32: a line"),
    ],
)
def test_images_of_a_size_that_the_model_refuses_stop_no_others(error, message, inputs, tmp_path):
    detector = run_exported.ExportedDetector(str(toy(tmp_path / "model.onnx")))
    model = detector._run

    def without_clip(images):
        if images.shape[2:] == (32, 32):
            raise error
        return model(images)

    detector._run = without_clip
    items, _ = listed(inputs)
    results = run_exported.detect_in(detector, list(items), repeat=0)
    errors = [str(result) for result in results if isinstance(result, run_exported.UserError)]
    assert len(results) == 13 and len(errors) == 6
    assert errors.count(f"{inputs / 'clip.avi'}: {message}") == 5


def listed(*paths):
    return run_exported.list_items(run_exported.list_files(list(map(str, paths))))


def test_batches_are_processed_at_a_time_and_few_are_read_ahead():
    """And the results come in order, whichever batch is done first."""
    both, taken = threading.Barrier(2), []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    def detect(batch):
        if batch[0] < 6:
            both.wait(timeout=60)  # until there are two
        time.sleep(0.01 if batch[0] % 2 else 0)
        return [10 * number for number in batch]

    results = run_exported.in_threads(detect, items(), threads=2, batch_size=3)
    assert next(results) == (0, 0) and len(taken) <= 15
    assert list(results) == [(number, 10 * number) for number in range(1, 1000)]


def test_threads_share_the_cores(inputs, run_here, tmp_path, monkeypatch):
    sessions, model = [], str(toy(tmp_path / "model.onnx"))

    class Session(onnxruntime.InferenceSession):
        def __init__(self, path, options, **others):
            sessions.append(options.intra_op_num_threads)
            super().__init__(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # put back afterwards
    for options in (["--threads", "3"], []):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert run_here(RUNNER, model, inputs / "1.png", *options).returncode == 0
    monkeypatch.setenv("OMP_NUM_THREADS", " 2,1")  # of nested loops, too
    assert run_here(RUNNER, model, inputs / "1.png").returncode == 0
    assert sessions == [3, 0, 2]  # 0: all


def test_packages_that_run_one_at_a_time_have_all_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # put back afterwards
    for kind, share in (("aoti", None), ("pt2", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setitem(run_exported.LOADERS, kind, lambda path, device: None)
        with zipfile.ZipFile(tmp_path / kind, "w") as archive:
            described = json.dumps({**METADATA, "format": kind})
            archive.writestr("model/extra/balanced_d2.json", described)
        run_exported.ExportedDetector(str(tmp_path / kind), threads=3)
        assert os.environ.get("OMP_NUM_THREADS") == share


def test_no_image_is_overwritten(run_here, tmp_path):
    """Not by the picture of another one either, which would be read only afterwards."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, color in (("a.bmp", "red"), ("a.png", "blue"), ("a_2.png", "green")):
        Image.new("RGB", (30, 20), color).save(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model = toy(tmp_path / "model.onnx")
    result = run_here(RUNNER, model, folder, "--output", folder, "--threshold", "0")
    assert result.returncode == 0
    assert {path: path.read_bytes() for path in before} == before
    written = {path.name for path in folder.iterdir()} - {path.name for path in before}
    assert written == {"detections.jsonl", "a_3.png", "a_4.png", "a_2_2.png"}


def test_arrays_do_not_replace_what_is_read(inputs, run_here, tmp_path):
    """By whatever name, and before anything is loaded."""
    model, photo = toy(tmp_path / "model.onnx"), inputs / "0.png"
    (tmp_path / "link").hardlink_to(photo)
    before = [path.read_bytes() for path in (model, photo)]
    for arrays in (model, photo, tmp_path / "link"):
        result = run_here(RUNNER, model, photo, "--arrays", arrays)
        assert_user_error(result, f"--arrays {arrays} would replace what is read")
        assert result.returncode == 2 and not result.stdout
    assert [path.read_bytes() for path in (model, photo)] == before


def test_pictures_of_a_run_differ_without_case_too(tmp_path):
    output = run_exported.Output(str(tmp_path), [], [])
    names = [output.picture_name(path).name for path in ("a/X.jpg", "b/x.jpg", "b/x_2.png")]
    assert names == ["X.png", "x_2.png", "x_2_2.png"]


def test_what_is_written_is_whole_however_a_run_ends(tmp_path, monkeypatch):
    photo = Image.new("RGB", (30, 20))
    record = {"image": "photo.jpg", "detections": []}
    photo.save(tmp_path / "photo.png")  # of a run before
    before = (tmp_path / "photo.png").read_bytes()

    def save(picture, file, *_):
        Path(file).write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save)
    output = run_exported.Output(str(tmp_path), [], [])
    with pytest.raises(KeyboardInterrupt), output:
        output.write(record, None, 0.0)
        lines = (tmp_path / "detections.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [record]
        output.write(record, photo, 0.0)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "detections.jsonl"}
    assert (tmp_path / "photo.png").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no disk that is full")
def test_a_full_disk_is_reported_for_each_image(inputs, run_here, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.jsonl").symlink_to("/dev/full")
    photos = [inputs / "0.png", inputs / "1.png"]
    model = toy(tmp_path / "model.onnx")
    result = run_here(RUNNER, model, *photos, "--output", tmp_path / "out")
    *errors, done = result.stderr.splitlines()
    assert result.returncode == 2 and done.startswith("done: 0 image(s)")
    assert errors == 2 * [f"error: cannot write to {tmp_path / 'out'}: No space left on device"]


def test_a_threshold_below_that_of_the_export_has_no_effect(inputs, run_here, tmp_path):
    model = toy(tmp_path / "model.onnx", score_threshold=0.25)
    note = "note: --threshold 0.2 has no effect below 0.25, the SCORE_THRESH_TEST of the export\n"
    result = run_here(RUNNER, model, inputs / "0.png", "--threshold", "0.2")
    assert result.returncode == 0 and result.stderr == note
    result = run_here(RUNNER, model, inputs / "0.png", "--threshold", "0.25")
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize("size", [(320, 640), (800, 1333), (240, 426), (96, 200), (500, 400)])
def test_images_are_scaled_to_detectron2s_size(size):
    """For all sizes of images, but that no side has less than a pixel."""
    sides = [*range(1, 240), *range(600, 640), *range(1198, 1240)]
    for height, width in itertools.product(sides, sides):
        expected = ResizeShortestEdge.get_output_shape(height, width, *size)
        found = run_exported.network_size(width, height, *size)
        assert found == (max(1, expected[1]), max(1, expected[0])), (height, width)
    assert run_exported.network_size(30, 20, 0, 0) == (30, 20)


def test_strips_keep_a_row(run_here, tmp_path):
    """Scaled until the longer side fits, the shorter one would have none."""
    Image.new("RGB", (500, 1)).save(tmp_path / "strip.png")
    model = toy(tmp_path / "model.onnx", min_size=96, max_size=200)
    result = run_here(RUNNER, model, tmp_path / "strip.png", "--threshold", "0")
    (line,) = records(result)
    assert (line["height"], line["width"], len(line["detections"])) == (1, 500, 1)


def test_arrays_that_are_none(run_here, tmp_path):
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "text.npy", np.full((3, 4, 5), "a"))
    np.save(tmp_path / "flat.npy", np.zeros((4, 5)))
    np.save(tmp_path / "gone.npy", np.zeros((3, 0, 5)))
    with open(tmp_path / "several.npy", "wb") as file:
        np.savez(file, a=np.zeros((3, 4, 5)))
    arrays = sorted(tmp_path.glob("*.npy"))
    result = run_here(RUNNER, toy(tmp_path / "model.onnx"), *arrays)
    *errors, done = result.stderr.splitlines()
    assert result.returncode == 2 and done.startswith("done: 0 image(s)")
    for path, line in zip(arrays, errors, strict=True):
        assert line.startswith(f"error: cannot read image {path}: ")


def test_a_video_that_ends_early_is_named(run_here, tmp_path):
    file, rng = tmp_path / "cut.avi", np.random.default_rng(0)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(20):
        writer.write(rng.integers(256, size=(48, 64, 3), dtype=np.uint8))
    writer.release()
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    result = run_here(RUNNER, toy(tmp_path / "model.onnx"), file)
    number = len(records(result))
    assert 0 < number < 20
    assert f"note: {file} ends after {number} of 20 images" in result.stderr


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runner_and_its_video(received, tmp_path):
    model, source, out = toy(tmp_path / "model.onnx"), tmp_path / "long.avi", tmp_path / "out"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"FFV1"), 5, (32, 32))
    for _ in range(2000):  # whose lines fill a pipe that is not read
        writer.write(np.zeros((32, 32, 3), np.uint8))
    writer.release()
    command = [sys.executable, RUNNER, model, source, "--threshold", "0", "--output", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        process.send_signal(received)
        lines += process.stdout.readlines()
    assert process.returncode == 130
    number = cv2.VideoCapture(str(out / "long.mp4")).get(cv2.CAP_PROP_FRAME_COUNT)
    assert 0 <= len(lines) - number <= 1 and len(lines) < 2000
    assert "".join(lines).startswith((out / "detections.jsonl").read_text())


def test_names_that_are_not_utf8(inputs, tmp_path):
    """OpenCV ends the process if it is given one."""
    video = inputs / "clip.avi"
    renamed, photo = (tmp_path / os.fsdecode(b"\xff" + name) for name in (b".avi", b".png"))
    shutil.copy(video, renamed)
    Image.new("RGB", (30, 20)).save(photo)
    out = tmp_path / os.fsdecode(b"out \xfe")
    model = toy(tmp_path / "model.onnx")
    result = run_program(RUNNER, model, renamed, photo, video, "--output", out)
    name, *folder, done = result.stderr.splitlines()
    assert result.returncode == 2 and done.startswith("done: 1 image(s)")
    assert name.startswith("error: cannot read video ") and "its name is not UTF-8" in name
    assert len(folder) == 5 and all("error: cannot write videos to " in line for line in folder)
    assert {path.name for path in out.iterdir()} == {"detections.jsonl", photo.name}


def test_who_reads_the_results_may_stop(inputs, tmp_path):
    command = [sys.executable, RUNNER, str(toy(tmp_path / "model.onnx")), str(inputs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in said and "Exception" not in said


def test_packages_that_are_missing(inputs, run_here, tmp_path, monkeypatch):
    model = toy(tmp_path / "model.onnx")
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "cv2", None)
        result = run_here(RUNNER, model, inputs)
        assert_user_error(result, "clip.avi needs the package opencv-python-headless")
        assert result.stdout == ""  # before anything is done
    monkeypatch.setattr(run_exported.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run_here(RUNNER, model, inputs)
    assert_user_error(result, "model.onnx needs the package onnxruntime: pip install onnxruntime")


@pytest.mark.parametrize("module, needing", [("cv2", "clip.avi"), ("onnxruntime", "model.onnx")])
def test_packages_that_cannot_be_imported(module, needing, inputs, tmp_path):
    """They are installed: what they lack is named, such as libGL, which OpenCV asks for."""
    reason = "libGL.so.1: cannot open shared object file"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"{module}.py").write_text(f"raise ImportError({reason!r})")
    paths = (toy(tmp_path / "model.onnx"), inputs / "clip.avi")
    result = run_program(RUNNER, *paths, env={"PYTHONPATH": str(tmp_path / "broken")})
    assert_user_error(result, f"{needing} needs a package that is installed but", reason)


def test_nothing_is_exported_that_could_not_be_verified(run_here, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    engines = {"onnxruntime", "openvino"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name in engines else find(name, *of)
    )
    arguments = ("--config-file", TINY_CONFIG, "--output", tmp_path / "out", "MODEL.WEIGHTS", "x")
    for kind in ("onnx", "onnx-batch"):
        result = run_here("tools/export_model.py", "--format", kind, *arguments)
        assert_user_error(result, f"no engine for {kind}", "pip install onnxruntime", "--no-verify")
    assert not (tmp_path / "out").exists()
    result = run_here("tools/export_model.py", "--format", "onnx", "--no-verify", *arguments)
    assert_user_error(result, "there is no file x")  # the next check


def test_openvino_is_an_engine(inputs, run_here, tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    arguments = [RUNNER, toy(tmp_path / "model.onnx"), inputs, "--threshold", "0"]
    expected = records(run_here(*arguments, "--engine", "onnxruntime"))
    found = records(
        run_here(*arguments, "--engine", "openvino", "--threads", "2", "--batch-size", "2")
    )
    for line in [*expected, *found]:
        for detection in line["detections"]:
            detection["score"] = round(detection["score"], 5)
    assert found == expected


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["{empty}"], ["no images and no videos in the folder", "empty"]),
        (["{clip}"], ["cannot read video", "clip.avi"]),
        (["{none}"], ["cannot read video", "none.mp4"]),
        (["x.png", "--threads", "0"], ["--threads and --batch-size"]),
        (["x.png", "--batch-size", "-1"], ["--threads and --batch-size"]),
        (["x.png", "--repeat", "-1"], ["--repeat 0 or more"]),
        (["{empty}/../clip.avi", "--arrays", "a.npz"], ["--arrays is for a single image"]),
        (["x.png", "--threshold", "50"], ["--threshold is 50, not in [0, 1]"]),
        (["x.png", "--threshold", "nan"], ["--threshold is nan, not in [0, 1]"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, parts, run_here, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "clip.avi").write_text("not a video")
    fill = {"{empty}": tmp_path / "empty", "{clip}": tmp_path / "clip.avi"}
    fill["{none}"] = tmp_path / "none.mp4"
    for key, value in fill.items():
        arguments = [argument.replace(key, str(value)) for argument in arguments]
    result = run_here(RUNNER, toy(tmp_path / "model.onnx"), *arguments)
    assert_user_error(result, *parts)
    assert result.returncode == 2


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_files_of_newer_versions_are_refused(kind, run_here, tmp_path):
    newer = {"format_version": 99, "versions": {"balanced_d2": "9.9"}}
    model = toy(tmp_path / "model.onnx", **newer)
    if kind == "torchscript":
        model = tmp_path / "model.ts"
        traced = torch.jit.trace(lambda image: image, torch.zeros(3, 4, 4))
        files = {"balanced_d2.json": json.dumps({"format": kind, **newer})}
        torch.jit.save(traced, str(model), _extra_files=files)
    assert_user_error(run_here(RUNNER, model, "x.png"), "format version 99", "9.9")


def test_files_of_pytorch_that_are_none(run_here, tmp_path):
    """What is wrong with them is not said by an engine of ONNX."""
    torch.save({"model": {}}, tmp_path / "weights.pth")
    data = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "cut.pt2").write_bytes(data[: len(data) // 2])
    said = run_here(RUNNER, tmp_path / "weights.pth", "x.png")
    assert_user_error(said, "weights.pth is not an exported model: it has no balanced_d2.json")
    said = run_here(RUNNER, tmp_path / "cut.pt2", "x.png")
    assert_user_error(said, "cut.pt2 is not an exported model, or is damaged", "not a zip file")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_devices_that_are_not_there(device, run_here, tmp_path):
    traced = torch.jit.trace(lambda image: image, torch.zeros(3, 4, 4))
    files = {"balanced_d2.json": json.dumps({"format": "torchscript", **METADATA})}
    torch.jit.save(traced, str(tmp_path / "model.ts"), _extra_files=files)
    result = run_here(RUNNER, tmp_path / "model.ts", "x.png", "--device", device)
    assert_user_error(result, f"error: --device {device}: ")
    result = run_here(RUNNER, tmp_path / "model.ts", "x.png", "--engine", "openvino")
    assert_user_error(result, "model.ts is run by PyTorch; --engine is for ONNX files")


def without(keys, model):
    """The toy, whose file does not say some things of itself."""
    described = onnx.load(model)
    metadata = json.loads(described.metadata_props[0].value)
    for key in keys:
        del metadata[key]
    onnx.helper.set_model_props(described, {"balanced_d2.json": json.dumps(metadata)})
    onnx.save(described, str(model))
    return model


def test_files_of_the_first_version_run(run_here, inputs, tmp_path, monkeypatch):
    """But not in OpenVINO, which finds other detections with them."""
    model = without(["format", "format_version"], toy(tmp_path / "model.onnx"))
    arguments = (RUNNER, model, inputs / "1.png", "--threshold", "0")
    result = run_here(*arguments, "--engine", "onnxruntime")
    assert result.returncode == 0 and len(json.loads(result.stdout)["detections"]) == 1
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    reason = "written by version 0.1.0, and OpenVINO finds other detections"
    assert_user_error(run_here(*arguments, "--engine", "openvino"), reason, "export it again")
    find = importlib.util.find_spec  # where it is the only engine
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: name != "onnxruntime" and find(name, *of)
    )
    assert_user_error(run_here(*arguments), reason)


def test_files_that_do_not_say_what_is_needed(run_here, inputs, tmp_path):
    model = without(["class_names", "min_size"], toy(tmp_path / "model.onnx"))
    result = run_here(RUNNER, model, inputs / "1.png")
    assert_user_error(result, "model.onnx cannot be used", "has no class_names, min_size")


def test_classes_without_a_name_have_their_number(run_here, inputs, tmp_path):
    model = toy(tmp_path / "model.onnx", class_names=["a"])  # the toy finds the second class
    result = run_here(RUNNER, model, inputs / "1.png", "--threshold", "0", "--output", tmp_path)
    assert result.returncode == 0
    assert [d["class"] for d in json.loads(result.stdout)["detections"]] == ["1"]


def test_folders_named_as_videos_are_no_videos(run_here, tmp_path):
    frames = tmp_path / "clips" / "clip.mp4"  # as programs name it that take videos apart
    frames.mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(frames / "0.png")
    result = run_here(RUNNER, toy(tmp_path / "model.onnx"), tmp_path / "clips")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1


def test_table_of_latencies(monkeypatch):
    """Of whole batches, from runs of each engine with as many images."""
    calls, verify = [], sys.modules["balanced_d2.export.verify"]

    def run(runner, path, image, runs, engine, number):
        calls.append((path, engine, number))
        return {"seconds": 0.002 if engine == "first" else 0.0031}, {}

    monkeypatch.setattr(verify, "_run", run)
    monkeypatch.setattr(verify, "_median", lambda detect: (len(detect()) / 10, 1))
    monkeypatch.setattr(verify, "installed_engines", lambda format: ["first", "second"])
    files = [("a/many.onnx", "onnx-batch"), ("a/one.onnx", "onnx")]
    said = export.latencies(lambda batch: batch, files, torch.zeros(3, 4, 5), RUNNER)
    assert [line.split() for line in said.splitlines()[2:]] == [
        ["eager", "100.0", "400.0", "800.0"],
        ["many.onnx,", "first", "2.0", "8.0", "16.0"],
        ["many.onnx,", "second", "3.1", "12.4", "24.8"],
        ["one.onnx,", "first", "2.0", "-", "-"],
        ["one.onnx,", "second", "3.1", "-", "-"],
    ]
    engines = ("first", "second")
    assert calls == [
        *(("a/many.onnx", engine, number) for engine in engines for number in (1, 4, 8)),
        *(("a/one.onnx", engine, 1) for engine in engines),
    ]


def test_the_runner_is_given_the_engine(monkeypatch):
    commands, verify = [], sys.modules["balanced_d2.export.verify"]

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "error: not here")

    monkeypatch.setattr(verify.subprocess, "run", run)
    monkeypatch.setattr(verify, "_run_eager", lambda model, image: (None, 7))
    with pytest.raises(RuntimeError, match="m.onnx does not run: error: not here"):
        export.verify(None, "m.onnx", [torch.zeros(3, 4, 5)], "onnx", RUNNER, "openvino")
    (command,) = commands
    assert command[1:3] == [RUNNER, "m.onnx"]
    assert [command[command.index(o) + 1] for o in ("--engine", "--repeat")] == ["openvino", "7"]


def test_latencies_of_all_engines(tmp_path):
    model = toy(tmp_path / "model.onnx")
    numbers = []
    image = torch.zeros(3, 20, 30)
    said = export.latencies(
        lambda batch: numbers.append(len(batch)),
        [(str(model), "onnx-batch"), (str(model), "onnx")],
        image,
        RUNNER,
    )
    _, _, eager, *rows = said.splitlines()
    assert eager.startswith("eager ") and set(numbers) == {1, 4, 8}
    engines = export.installed_engines("onnx")
    assert [row.split()[1] for row in rows] == 2 * engines and "onnxruntime" in engines
    for row in rows[: len(engines)]:
        assert all(float(value) >= 0 for value in row.split()[2:]) and len(row.split()) == 5
    assert all(row.split()[3:] == ["-", "-"] for row in rows[len(engines) :])
