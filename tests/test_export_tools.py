"""tools/export_model.py and tools/run_exported.py as a user calls them, on the trained demo."""

import json
import os
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ROIMasks
from PIL import Image

from balanced_d2 import load_config
from balanced_d2.checkpoint import load_weights
from balanced_d2.commands import export_model
from balanced_d2.data.datasets.shapes import CLASSES
from balanced_d2.export import Comparison, run_exported
from balanced_d2.export.verify import Detections
from balanced_d2.utils.errors import UserError, report_user_errors

from .conftest import DEMO_CONFIG, TINY_CONFIG, assert_user_error, load_tool, run_program
from .test_export import KEYPOINTS, MASKS, METADATA, small_model, smooth_image

pytestmark = pytest.mark.slow

EXPORTS = {
    "tracing": ("model.ts", ["--method", "tracing"]),  # which old commands say
    "onnx": ("model.onnx", ["--format", "onnx"]),
}
# Boxes in pixels, scores.
TOLERANCES = {"tracing": (1e-3, 1e-5), "onnx": (1e-2, 1e-4)}


@pytest.fixture(scope="module")
def datasets(demo):
    return {"DETECTRON2_DATASETS": str(demo / "datasets")}


@pytest.fixture(scope="module")
def exports(demo, datasets, tmp_path_factory):
    """What export_model.py wrote and said, by kind."""
    results = {}
    for kind, (name, options) in EXPORTS.items():
        folder = tmp_path_factory.mktemp(kind) / "made" / "by the tool"
        result = run_program(
            "tools/export_model.py",
            *("--config-file", DEMO_CONFIG, "--output", folder),
            *options,
            *("MODEL.WEIGHTS", demo / "output" / "model_final.pth"),
            env=datasets,
        )
        results[kind] = (folder / name, result)
    return results


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment where neither Detectron2 nor this project can be imported."""
    folder = tmp_path_factory.mktemp("bare")
    for package in ("detectron2", "balanced_d2"):
        (folder / f"{package}.py").write_text("raise ImportError('not here')")
    env = {"PYTHONPATH": str(folder)}
    for package in ("detectron2", "balanced_d2"):
        result = run_python(f"import {package}", env)
        assert "ImportError: not here" in result.stderr
    return env


def run_python(code, env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.sep,  # where the project is not imported from the current folder
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def evaluated(demo):
    """Detections of the evaluation after the training by file name."""
    annotations = json.loads((demo / "datasets" / "balanced_shapes" / "val.json").read_text())
    predictions = json.loads(
        (demo / "output" / "inference" / "coco_instances_results.json").read_text()
    )
    classes = [category["id"] for category in annotations["categories"]]
    by_image = {}
    for image in annotations["images"]:
        found = [
            {**p, "bbox": corners(*p["bbox"]), "class_id": classes.index(p["category_id"])}
            for p in predictions
            if p["image_id"] == image["id"]
        ]
        by_image[image["file_name"]] = as_detections({**image, "detections": found})
    return by_image


def corners(x, y, width, height):
    return [x, y, x + width, y + height]


def as_detections(record):
    found = record["detections"]
    return Detections(
        np.reshape([d["bbox"] for d in found], (-1, 4)),
        np.array([d["class_id"] for d in found]),
        np.array([d["score"] for d in found]),
        (record["height"], record["width"]),
        latency=0.0,
    )


def without_counterpart(a, b, tolerance):
    """The number of detections of either that the other does not have within the tolerance."""
    box_tolerance, score_tolerance = tolerance
    same = (
        (np.abs(a.boxes[:, None] - b.boxes[None]).max(axis=2) <= box_tolerance)
        & (np.abs(a.scores[:, None] - b.scores[None]) <= score_tolerance)
        & (a.classes[:, None] == b.classes[None])
    )
    return (~same.any(axis=1)).sum() + (~same.any(axis=0)).sum()


@pytest.mark.parametrize("kind", EXPORTS)
def test_export_verifies_itself_and_is_quiet(exports, kind):
    file, result = exports[kind]
    assert result.returncode == 0, result.stderr
    assert file.is_file() and list(file.parent.iterdir()) == [file]
    assert "equal: boxes within" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.endswith(" equal")]
    assert len(rows) == 3
    everything = result.stdout + result.stderr
    assert "Warning" not in everything
    assert everything.count("deprecated") == (0 if kind == "onnx" else 1)


@pytest.mark.parametrize("kind", EXPORTS)
def test_runner_without_detectron2_equals_evaluation(
    exports, kind, bare, demo, evaluated, tmp_path
):
    images = demo / "datasets" / "balanced_shapes" / "val"
    result = run_program(
        "tools/run_exported.py",
        exports[kind][0],
        *(images / name for name in evaluated),
        *("--threshold", "0.05", "--output", tmp_path),
        env=bare,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("done: ") and result.stderr.count("\n") == 1
    assert result.stdout == (tmp_path / "detections.jsonl").read_text()
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [os.path.basename(record["image"]) for record in records] == list(evaluated)
    disagreeing = {}
    for record in records:
        expected, found = evaluated[os.path.basename(record["image"])], as_detections(record)
        if not Comparison(expected, found, TOLERANCES[kind]).agrees:
            disagreeing[record["image"]] = without_counterpart(expected, found, TOLERANCES[kind])
        assert all(d["class"] == CLASSES[d["class_id"]] for d in record["detections"])
    # Of the thousands of overlaps that suppression compares with its threshold, one may lie on it
    # within rounding, which differs from machine to machine: a detection more or less, in one
    # image.
    assert len(disagreeing) <= 1 and sum(disagreeing.values()) <= 3, disagreeing
    assert sum(len(record["detections"]) for record in records) > 100
    for name in evaluated:
        with (
            Image.open(images / name) as image,
            Image.open(tmp_path / f"{name.rsplit('.', 1)[0]}.png") as picture,
        ):
            assert picture.size == image.size
            assert (np.asarray(picture) != np.asarray(image.convert("RGB"))).any()


def test_torchscript_needs_only_torch_and_torchvision(exports, bare):
    result = run_python(
        "import sys, torch, torchvision\n"
        f"model = torch.jit.load({str(exports['tracing'][0])!r})\n"
        "for dtype in (torch.uint8, torch.float32):\n"
        "    image = torch.zeros(3, 77, 131, dtype=dtype)\n"
        "    boxes, classes, scores, size = model(image)\n"
        "    assert size.tolist() == [77, 131] and boxes.shape == (len(scores), 4)\n"
        "    assert len(classes) == len(scores)\n"
        "assert not {'detectron2', 'balanced_d2'} & set(sys.modules)\n",
        bare,
    )
    assert result.returncode == 0, result.stderr


def test_runner_scales_images_and_keeps_what_is_there(exports, run_here, tmp_path):
    """An image larger than the network's, turned by its EXIF tag, in the folder of the output."""
    from detectron2.data.detection_utils import read_image
    from detectron2.engine import DefaultPredictor

    noise = np.random.default_rng(0).integers(256, size=(9, 11, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((500, 333), Image.Resampling.BICUBIC)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "photo.png", exif=exif)
    before = (tmp_path / "photo.png").read_bytes()

    file, _ = exports["tracing"]
    result = run_here(
        *("tools/run_exported.py", file, tmp_path / "photo.png", tmp_path / "photo.png"),
        *("--threshold", "0", "--output", tmp_path),
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "photo.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "photo.png",
        "photo_2.png",
        "photo_3.png",
        "detections.jsonl",
    }
    record = json.loads(result.stdout.splitlines()[0])
    assert (record["height"], record["width"]) == (500, 333)

    weights = exports["tracing"][1].args[-1]
    options = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "5"]
    cfg = load_config(DEMO_CONFIG, [*options, "MODEL.WEIGHTS", str(weights)])
    expected = DefaultPredictor(cfg)(read_image(str(tmp_path / "photo.png"), "BGR"))["instances"]
    assert len(record["detections"]) == len(expected) > 0
    np.testing.assert_allclose(
        [detection["bbox"] for detection in record["detections"]],
        expected.pred_boxes.tensor.numpy(),
        rtol=0,
        atol=1e-3,
    )


def test_masks_and_keypoints(run_here, tmp_path):
    """Exported, verified and run on an image that is larger than the network's."""
    from detectron2.engine import DefaultPredictor

    opts = ["MODEL.FPN.OUT_CHANNELS", "32", *MASKS, *KEYPOINTS, "INPUT.MIN_SIZE_TEST", "96"]
    opts += ["MODEL.RPN.POST_NMS_TOPK_TEST", "30", "TEST.DETECTIONS_PER_IMAGE", "8"]
    opts += ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "DATASETS.TEST", "()"]
    opts += ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    weights = small_model(*opts).state_dict()
    weights["roi_heads.mask_head.predictor.bias"] += 2  # solid masks rather than scattered pixels
    torch.save({"model": weights}, tmp_path / "model.pth")
    image = smooth_image(150, 221).permute(1, 2, 0).numpy()
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    result = run_here(
        *("tools/export_model.py", "--config-file", TINY_CONFIG, "--output", tmp_path / "out"),
        *("--sample-image", tmp_path / "photo.png", *opts),
    )
    assert result.returncode == 0, result.stderr
    assert "of masks" in result.stdout and "of keypoints" in result.stdout
    assert "masks within 0.0001, keypoints within 0.01 px" in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.endswith(" equal")]) == 3

    result = run_here(
        *("tools/run_exported.py", tmp_path / "out" / "model.ts", tmp_path / "photo.png"),
        *("--threshold", "0", "--output", tmp_path, "--arrays", tmp_path / "arrays.npz"),
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["detections"]
    with np.load(tmp_path / "arrays.npz") as file:
        arrays = dict(file)
    assert list(arrays) == ["boxes", "classes", "scores", "masks", "keypoints", "image_size"]
    assert arrays["image_size"].tolist() == [96, 141]
    expected = DefaultPredictor(load_config(TINY_CONFIG, opts))(image)["instances"]
    assert len(found) == len(arrays["masks"]) == len(expected) == 8
    np.testing.assert_allclose(
        [d["keypoints"] for d in found], expected.pred_keypoints.numpy(), rtol=0, atol=0.01
    )
    for detection, mask in zip(found, expected.pred_masks.numpy()):
        filled = np.zeros(mask.shape, np.uint8)
        for outline in detection["segmentation"]:
            points = np.reshape(outline, (-1, 1, 2)) - 0.5
            cv2.fillPoly(filled, [points.astype(np.int32)], 1)
        contours, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        without_holes = cv2.fillPoly(np.zeros(mask.shape, np.uint8), contours, 1)
        assert (filled != without_holes).mean() < 0.002
    assert all(d["segmentation"] for d in found)
    with Image.open(tmp_path / "photo_2.png") as picture:
        changed = (np.asarray(picture)[:, :, ::-1] != image).any(axis=2)
    seen = expected.pred_masks.any(dim=0).numpy()
    assert (changed & seen).sum() > 0.98 * seen.sum()
    x, y, _ = expected.pred_keypoints[0, 0].int().tolist()
    assert changed[max(y, 0), max(x, 0)]


def test_pasted_masks_are_detectron2s():
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 60, (30, 2)), rng.uniform(0.5, 60, (30, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    coarse = torch.from_numpy(rng.random((30, 1, 4, 4), dtype=np.float32))
    masks = torch.nn.functional.interpolate(coarse, (28, 28), mode="bicubic")[:, 0].clamp(0, 1)
    bitmasks = ROIMasks(masks).to_bitmasks(Boxes(torch.from_numpy(boxes)), 120, 120).tensor
    different = 0
    for box, mask, expected in zip(boxes, masks.numpy(), bitmasks.numpy()):
        whole = np.zeros_like(expected)
        pasted, (x, y) = run_exported.paste(mask, box)
        whole[y : y + pasted.shape[0], x : x + pasted.shape[1]] = pasted
        different += (whole != expected).sum()
    assert different < 0.01 * bitmasks.sum()


def test_outlines_go_through_the_centres_of_pixels():
    mask = np.zeros((28, 28), np.float32)
    mask[:14] = 1  # the upper half, and one more point
    mask[20, 20] = 1
    (outline,) = run_exported.outlines(mask, np.array([10, 20, 38, 48], np.float32))
    points = np.reshape(outline, (-1, 2))
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == (
        [10.5, 20.5],
        [37.5, 33.5],
    )


def test_files_without_names_of_outputs_run(run_here, tmp_path):
    """As written before there were others than boxes."""

    def detect(image):
        return image[0, :1, :4], torch.ones(1).long(), torch.full((1,), 0.75), torch.zeros(2)

    traced = torch.jit.trace(detect, torch.zeros(3, 20, 30))
    metadata = {**METADATA, "input_format": "RGB"}
    del metadata["format_version"]
    files = {"balanced_d2.json": json.dumps(metadata)}
    torch.jit.save(traced, str(tmp_path / "model.ts"), _extra_files=files)
    np.save(tmp_path / "image.npy", np.arange(1800).reshape(3, 20, 30))
    result = run_here("tools/run_exported.py", tmp_path / "model.ts", tmp_path / "image.npy")
    assert json.loads(result.stdout)["detections"] == [
        {"bbox": [0.0, 1.0, 2.0, 3.0], "class": "b", "class_id": 1, "score": 0.75}
    ]


def test_threshold(exports, demo, run_here):
    image = next((demo / "datasets" / "balanced_shapes" / "val").iterdir())

    def scores_from(threshold):
        result = run_here(
            "tools/run_exported.py", exports["onnx"][0], image, "--threshold", threshold
        )
        return [d["score"] for d in json.loads(result.stdout)["detections"]]

    scores = scores_from(0)
    middle = (max(scores) + min(scores)) / 2
    expected = [score for score in scores if score >= middle]
    assert 0 < len(expected) < len(scores)
    assert scores_from(middle) == expected and scores_from(1) == []


def test_verification_finds_a_model_that_is_not_equal(exports, demo, capsys):
    cfg = load_config(DEMO_CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    model = build_model(cfg).eval()
    load_weights(model, str(demo / "output" / "model_final.pth"))
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[-1] += 0.01  # of the background
    file, _ = exports["tracing"]
    images = [torch.from_numpy(np.asarray(example_image(demo)).transpose(2, 0, 1).copy())]
    with pytest.raises(SystemExit) as stopped:
        export_model.verify(model, str(file), images, "torchscript")
    assert "is not equal to the model; the file is kept" in stopped.value.code
    assert "DIFFERENT" in capsys.readouterr().out
    assert file.is_file()


def example_image(demo):
    return Image.open(next((demo / "datasets" / "balanced_shapes" / "val").iterdir()))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the tiny config with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    model = build_model(load_config(TINY_CONFIG, ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    (folder / "broken.pth").write_bytes((folder / "model.pth").read_bytes()[:1000])
    (folder / "text.pth").write_text("not a checkpoint")
    return folder


@pytest.mark.parametrize(
    "options, opts, parts",
    {
        "no weights": ([], [], ["nothing to export", "MODEL.WEIGHTS"]),
        "no such weights": ([], ["MODEL.WEIGHTS", "{weights}/none.pth"], ["there is no file"]),
        "broken weights": ([], ["MODEL.WEIGHTS", "{weights}/broken.pth"], ["cannot load"]),
        "no weights at all": ([], ["MODEL.WEIGHTS", "{weights}/text.pth"], ["cannot load"]),
        "weights of another number of classes": (
            [],
            ["MODEL.WEIGHTS", "{weights}/model.pth", "MODEL.ROI_HEADS.NUM_CLASSES", "7"],
            ["MODEL.ROI_HEADS.NUM_CLASSES is 7, but", "model.pth has 80 classes"],
        ),
        "weights of another shape": (
            [],
            ["MODEL.WEIGHTS", "{weights}/model.pth", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"],
            ["roi_heads.box_head.fc1.weight has shape", "more"],
        ),
        "weights of less": (
            [],
            ["MODEL.WEIGHTS", "{weights}/model.pth", "MODEL.ROI_BOX_HEAD.NUM_FC", "3"],
            ["roi_heads.box_head.fc3.weight is missing"],
        ),
        "weights of more": (
            [],
            ["MODEL.WEIGHTS", "{weights}/model.pth", "MODEL.BALANCED_FPN.ENABLED", "False"],
            ["backbone.balancer.refine.theta.weight is left over"],
        ),
        "output below a file": (
            ["--output", "{weights}/text.pth/below"],
            ["MODEL.WEIGHTS", "{weights}/model.pth"],
            ["cannot write to the folder", "text.pth"],
        ),
        "meta-architecture": (
            [],
            [
                *("MODEL.WEIGHTS", "{weights}/model.pth"),
                *("MODEL.META_ARCHITECTURE", "PanopticFPN"),
            ],
            ["the meta-architecture PanopticFPN cannot be exported"],
        ),
        "scripting": (
            ["--method", "scripting"],
            ["MODEL.WEIGHTS", "{weights}/model.pth"],
            ["--method scripting was retired", "tracing"],
        ),
        "keypoints for ONNX": (
            ["--format", "onnx"],
            ["MODEL.WEIGHTS", "{weights}/model.pth", *KEYPOINTS],
            ["predicts keypoints cannot be exported to ONNX", "to TorchScript"],
        ),
        "sample image": (
            ["--sample-image", "{weights}/none.jpg"],
            ["MODEL.WEIGHTS", "{weights}/model.pth"],
            ["cannot read the sample image", "none.jpg"],
        ),
        "unknown key": ([], ["MODEL.WEIGTHS", "x"], ["MODEL.WEIGTHS", "did you mean"]),
    }.values(),
)
def test_export_tells_what_is_wrong(options, opts, parts, weights, tmp_path, monkeypatch, capsys):
    fill = [text.replace("{weights}", str(weights)) for text in (*options, *opts)]
    if "--output" not in options:
        fill = ["--output", str(tmp_path / "output"), *fill]
    arguments = ["export_model.py", "--config-file", TINY_CONFIG, *fill]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)  # whose classes could be others
    tool = load_tool("export_model")
    assert report_user_errors(tool.main, tool.parse_args()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in parts)
    assert not list(tmp_path.rglob("model.*"))


def test_export_ends_with_one_line_and_an_exit_code(weights, tmp_path):
    result = run_program(
        *("tools/export_model.py", "--config-file", TINY_CONFIG, "--output", tmp_path),
        *("MODEL.WEIGHTS", weights / "none.pth"),
    )
    assert_user_error(result, "there is no file", "none.pth")
    assert result.returncode == 2


@pytest.mark.parametrize(
    "arguments, parts",
    {
        "no such model": (["{bad}/none.ts", "{image}"], ["there is no model file", "none.ts"]),
        "cut TorchScript": (["{bad}/cut.ts", "{image}"], ["cut.ts is not an exported model"]),
        "cut ONNX": (["{bad}/cut.onnx", "{image}"], ["cut.onnx is not an exported model"]),
        "a zip": (
            ["{bad}/other.zip", "{image}"],
            ["other.zip is not an exported model: "],
        ),
        "another TorchScript": (
            ["{bad}/other.ts", "{image}"],
            ["other.ts is not an exported model: "],
        ),
        "no such image": (["{model}", "{bad}/none.jpg"], ["cannot read image", "none.jpg"]),
        "image is text": (["{model}", "{bad}/text.jpg"], ["cannot read image", "text.jpg"]),
        "cut image": (["{model}", "{bad}/cut.png"], ["cannot read image", "cut.png"]),
        "array": (["{model}", "{bad}/flat.npy"], ["flat.npy", "(3, height, width)"]),
        "output is a file": (
            ["{model}", "{image}", "--output", "{bad}/text.jpg"],
            ["cannot write to", "text.jpg"],
        ),
        "arrays of two images": (
            ["{model}", "{image}", "{image}", "--arrays", "{bad}/arrays.npz"],
            ["--arrays is for a single image"],
        ),
        "arrays below a file": (
            ["{model}", "{image}", "--arrays", "{bad}/text.jpg/arrays.npz"],
            ["cannot write", "arrays.npz"],
        ),
        "device for ONNX": (["{onnx}", "{image}", "--device", "cuda"], ["--device"]),
    }.values(),
)
def test_runner_tells_what_is_wrong(arguments, parts, exports, bad_files, run_here):
    fill = {
        "{model}": exports["tracing"][0],
        "{onnx}": exports["onnx"][0],
        "{bad}": bad_files,
        "{image}": bad_files / "good.png",
    }
    for key, value in fill.items():
        arguments = [argument.replace(key, str(value)) for argument in arguments]
    result = run_here("tools/run_exported.py", *arguments)
    assert_user_error(result, *parts)
    assert result.returncode == 2


@pytest.fixture(scope="module")
def bad_files(exports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    Image.new("RGB", (60, 40), "red").save(folder / "good.png")
    noise = np.random.default_rng(0).integers(256, size=(80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    for name, source in (
        ("cut.png", folder / "cut.png"),
        ("cut.ts", exports["tracing"][0]),
        ("cut.onnx", exports["onnx"][0]),
    ):
        data = source.read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "text.jpg").write_text("not an image")
    np.save(folder / "flat.npy", np.zeros((4, 4)))
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("note.txt", "nothing")
    torch.jit.save(torch.jit.trace(lambda x: x + 1, torch.zeros(1)), str(folder / "other.ts"))
    return folder


def test_runner_goes_on_after_an_image_that_cannot_be_read(exports, bad_files, bare):
    result = run_program(
        "tools/run_exported.py",
        exports["onnx"][0],
        *(bad_files / "text.jpg", bad_files / "good.png", bad_files / "cut.png"),
        env=bare,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 3 and "2 failed" in result.stderr
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == [
        str(bad_files / "good.png")
    ]


def test_wrong_weights_are_refused_by_the_library_too(weights):
    model = build_model(load_config(TINY_CONFIG, ["MODEL.DEVICE", "cpu"]))
    load_weights(model, str(weights / "model.pth"))
    with pytest.raises(UserError, match="cannot load"):
        load_weights(model, str(weights / "broken.pth"))
