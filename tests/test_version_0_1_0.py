"""What balanced_d2 0.1.0 wrote evaluates, resumes and exports as it did: tests/data/0.1.0."""

import json
import shutil

import cv2
import pytest
import torch
from detectron2.modeling import build_model

from balanced_d2 import load_config

from .conftest import ROOT, assert_user_error, load_tool, logged, write_coco

OLD = ROOT / "tests" / "data" / "0.1.0"
CONFIG, WEIGHTS = OLD / "faster_rcnn.yaml", OLD / "faster_rcnn.pth"
EXPECTED = json.loads((OLD / "faster_rcnn.json").read_text())

load_tool("tiny_backbone", "tests/data/0.1.0")  # registers


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The data that 0.1.0 had, as PNG: JPEG would depend on OpenCV's version."""
    return write_coco(tmp_path_factory.mktemp("shapes") / "data", suffix=".png")


@pytest.fixture
def old_train_net(train_net_here, shapes, tmp_path):
    """train_net.py with a config of 0.1.0; the output goes to ``tmp_path``."""

    def run(*arguments, config=CONFIG):
        register = ("--register", "shapes", shapes, shapes.parent / "images")
        return train_net_here(*register, *arguments, "OUTPUT_DIR", tmp_path, config=config)

    return run


def assert_as_detected(detections):
    """The same detections in the same order; in other bits, since CPUs differ."""
    assert len(detections) == len(EXPECTED["detections"]) > 20
    for detection, expected in zip(detections, EXPECTED["detections"]):
        for key in ("image_id", "category_id"):
            assert detection[key] == expected[key]
        assert detection["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert detection["bbox"] == pytest.approx(expected["bbox"], rel=1e-5, abs=1e-4)


def test_evaluates(old_train_net, tmp_path):
    result = old_train_net("--eval-only", "MODEL.WEIGHTS", WEIGHTS)
    assert result.returncode == 0, result.stderr
    file = tmp_path / "inference" / "coco_instances_results.json"
    assert_as_detected(json.loads(file.read_text()))


def test_resumes(old_train_net, tmp_path):
    """With the momentum, the images and the random numbers that would have come next."""
    shutil.copy(WEIGHTS, tmp_path / "model_0000299.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000299.pth")
    result = old_train_net("--resume")
    assert result.returncode == 0, result.stderr
    assert "Starting training from iteration 300" in result.stdout + result.stderr
    got = {key: value for line in reversed(logged(tmp_path)) for key, value in line.items()}
    assert len(EXPECTED["resumed"]) == 8
    for key, expected in EXPECTED["resumed"].items():
        assert got[key] == pytest.approx(expected, rel=1e-4), key


@pytest.mark.slow
def test_exports(run_here, shapes, tmp_path):
    result = run_here(
        *("tools/export_model.py", "--config-file", CONFIG, "--output", tmp_path, "--no-verify"),
        *("--register", "shapes", shapes, shapes.parent / "images", "MODEL.WEIGHTS", WEIGHTS),
    )
    assert result.returncode == 0, result.stderr
    exported = torch.jit.load(tmp_path / "model.ts")
    detections = []
    for image_id in range(1, 7):
        image = cv2.imread(str(shapes.parent / "images" / f"{image_id}.png"))
        with torch.no_grad():
            boxes, classes, scores, _ = exported(torch.from_numpy(image.transpose(2, 0, 1)))
        boxes[:, 2:] -= boxes[:, :2]
        detections += [
            {"image_id": image_id, "category_id": category + 1, "bbox": box, "score": score}
            for box, category, score in zip(boxes.tolist(), classes.tolist(), scores.tolist())
        ]
    assert_as_detected(detections)


@pytest.mark.slow
def test_balances_that_0_1_0_set_on_every_model(old_train_net, tmp_path):
    """0.1.0 had them on by default, also of heads that its RetinaNet does not have: what it wrote
    is evaluated and resumed with a warning, but no new training begins that way."""
    config = OLD / "retinanet.yaml"
    idle = "MODEL.ROI_HEADS.NEGATIVE_SAMPLER is 'iou_balanced', but BalancedRetinaNet has no RoI"
    assert_user_error(old_train_net(config=config), idle)

    weights = tmp_path / "weights.pth"
    model = build_model(load_config(str(config), []))
    torch.save({"model": model.state_dict()}, weights)
    result = old_train_net("--eval-only", "MODEL.WEIGHTS", weights, config=config)
    assert result.returncode == 0, result.stderr
    assert idle in result.stdout + result.stderr
    assert (tmp_path / "inference" / "coco_instances_results.json").is_file()
    weights.unlink()

    known = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "random"]
    known += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1"]
    result = old_train_net(*known, "SOLVER.MAX_ITER", "1", config=config)
    assert result.returncode == 0 and idle not in result.stdout, result.stderr
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    del final["config"]  # 0.1.0 did not store it
    torch.save(final, tmp_path / "model_final.pth")
    result = old_train_net("--resume", config=config)
    assert result.returncode == 0, result.stderr
    assert idle in result.stdout + result.stderr
    assert "Starting training from iteration 1" in result.stdout + result.stderr
