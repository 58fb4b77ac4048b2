"""Fixtures: small datasets on disk, and the project's programs as subprocesses."""

import copy
import importlib.util
import json
import logging
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import _cached_log_stream, setup_logger
from iopath.common.file_io import file_lock
from torch import nn

from balanced_d2 import load_config
from balanced_d2.config.checks import check_config
from balanced_d2.data import register_coco
from balanced_d2.engine import BalancedTrainer  # which registers everything

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, with their subprocesses
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# A script that starts the tests in the background has SIGINT ignored, here and in subprocesses.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    for item in items:
        if "demo" in item.fixturenames:  # it trains a model first
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bccd_root():
    """The folder to set DETECTRON2_DATASETS to, for tests on real images."""
    if not (SHARED_DATA / "bccd" / "val.json").is_file():
        pytest.skip("needs BCCD in ../shared/data/bccd, which does not exist")
    return SHARED_DATA


def write_coco(folder: Path, num_images: int = 6, seed: int = 0, suffix: str = ".jpg") -> Path:
    """Write a data set of bright (class 1) and dark (class 2) squares; return its JSON file.

    Each square has a mask, and the midpoints of its left and right side as keypoints.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        image = rng.integers(100, 140, (64, 80, 3), dtype=np.uint8)
        for _ in range(3):
            category = int(rng.integers(1, 3))
            side, x, y = (
                int(rng.integers(8, 30)),
                int(rng.integers(0, 50)),
                int(rng.integers(0, 34)),
            )
            image[y : y + side, x : x + side] = 230 if category == 1 else 20
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                    "segmentation": [
                        [x, y, x + side, y, x + side, y + side, x, y + side],
                    ],
                    "keypoints": [x, y + side // 2, 2, x + side, y + side // 2, 2],
                    "num_keypoints": 2,
                }
            )
        file_name = f"{image_id}{suffix}"
        cv2.imwrite(str(folder / "images" / file_name), image)
        images.append({"id": image_id, "file_name": file_name, "height": 64, "width": 80})
    keypoints = {"keypoints": ["left_side", "right_side"], "skeleton": [[1, 2]]}
    categories = [{"id": i, "name": n, **keypoints} for i, n in ((1, "bright"), (2, "dark"))]
    json_file = folder / "annotations.json"
    json_file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return json_file


def write_bccd(datasets: Path) -> None:
    """Write a substitute for BCCD to a folder for ``DETECTRON2_DATASETS``."""
    json_file = write_coco(datasets / "bccd", num_images=4)
    content = json.loads(json_file.read_text())
    content["categories"].append({"id": 3, "name": "third"})
    for split in ("train", "val"):
        json_file.with_name(f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory) -> Path:
    """The annotation file of a tiny dataset; its images are in ``images/`` beside it."""
    return write_coco(tmp_path_factory.mktemp("tiny_coco") / "data")


def has_localhost() -> bool:
    """Whether this machine has an address for ``localhost``, which ``torchrun`` needs.

    A machine newly built by debootstrap may have no /etc/hosts and so no such address.
    """
    try:
        return bool(socket.getaddrinfo("localhost", None))
    except OSError:
        return False


needs_localhost = pytest.mark.skipif(not has_localhost(), reason="localhost has no address here")

DEMO_CONFIG = "configs/Demo/balanced_faster_rcnn_R_18_FPN.yaml"


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The folder of a shortened run of the demo: ``output/model_final.pth`` and ``datasets/``.

    The first worker creates it for all.
    """
    folder = tmp_path_factory.getbasetemp() / "demo"
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers' folders share a parent
        folder = folder.parent.parent / "demo"
    with file_lock(str(folder)):
        if not (folder / "finished").exists():
            result = train_net(
                *("OUTPUT_DIR", folder / "output"),
                *("SOLVER.MAX_ITER", "60", "SOLVER.WARMUP_ITERS", "10"),
                config=DEMO_CONFIG,
                env={"DETECTRON2_DATASETS": str(folder / "datasets")},
            )
            assert result.returncode == 0, result.stderr
            (folder / "finished").touch()
    return folder


TINY_MODEL = [
    *("MODEL.ROI_HEADS.NUM_CLASSES", "2"),
    *("MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "100"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("INPUT.MIN_SIZE_TEST", "64"),
    *("SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.MAX_ITER", "2"),
    *("SOLVER.WARMUP_ITERS", "1"),
]
TINY_CONFIG = "configs/BCCD/balanced_faster_rcnn_R_18_FPN.yaml"


def run_program(*arguments, env=None) -> subprocess.CompletedProcess:
    """Run a program of the project as a user does, from the project's root."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def train_net(*arguments, config=TINY_CONFIG, env=None) -> subprocess.CompletedProcess:
    return run_program("train_net.py", "--config-file", config, *arguments, env=env)


@contextmanager
def cleaned_up():
    """Context manager in which a program may register datasets and set up its log."""
    registered = set(DatasetCatalog)
    try:
        yield
    finally:
        for name in set(DatasetCatalog) - registered:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name, None)
        # Loggers keep the streams of the test in which they were set up.
        setup_logger.cache_clear()
        _cached_log_stream.cache_clear()
        for name in ("detectron2", "fvcore", "balanced_d2"):
            logging.getLogger(name).handlers.clear()


@pytest.fixture
def run_here(capfd, monkeypatch):
    """Like :func:`run_program`, but in this process, which saves the start-up time: for the many
    tests that are not about the process itself."""

    def run_main(program, *arguments) -> subprocess.CompletedProcess:
        capfd.readouterr()
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        returncode = 0
        try:
            with cleaned_up():
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as stop:
            returncode = stop.code or 0
        return subprocess.CompletedProcess(sys.argv, returncode, *capfd.readouterr())

    return run_main


@pytest.fixture
def train_net_here(run_here):
    """Like :func:`train_net`, but in this process."""

    def run_main(*arguments, config=TINY_CONFIG) -> subprocess.CompletedProcess:
        return run_here("train_net.py", "--config-file", config, *arguments)

    return run_main


def assert_user_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """The program ended with a single line about the error, which contains all ``parts``."""
    assert result.returncode not in (0, None), result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0]


def logged(output: Path) -> list:
    """The lines of a run's metrics.json."""
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def load_tool(name: str, folder: str = "tools"):
    """A program of ``tools/``, or of another folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def chromium():
    """A browser without a window, by selenium; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1400,1180")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def wait_for(condition, seconds=120):
    """What a function returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.1)
    return value


# Trainings of a model of one layer, in this process, with evaluations whose results are given.

EVAL_PERIOD = 2


class Killed(BaseException):
    """Ends a training as a signal would."""


class Small(nn.Module):
    """A model that can be trained on any image; its loss depends on chance, too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, inputs):
        mean = torch.stack([sample["image"].float().mean() for sample in inputs]).mean() / 255
        return {"loss": (self.layer(torch.stack([mean, torch.rand(())])) - 1).square().sum()}


@pytest.fixture
def training(tiny_coco, monkeypatch):
    """Runs a training whose evaluations give the values of a list, and may be killed."""
    monkeypatch.setattr(DatasetCatalog, "data", copy.copy(DatasetCatalog.data))  # undone afterwards
    register_coco("judged", str(tiny_coco), str(tiny_coco.parent / "images"))

    def run(folder, values, *options, resume=False, kill_in=None, max_iter=None):
        """Train; the evaluation number ``kill_in`` never ends.

        Returns:
            How many evaluations there were.
        """
        max_iter = max_iter or EVAL_PERIOD * len(values)
        calls = []

        class Trainer(BalancedTrainer):
            @classmethod
            def build_model(cls, cfg):
                return Small()

            @classmethod
            def test(cls, cfg, model, evaluators=None):
                number = math.ceil(min(get_event_storage().iter + 1, max_iter) / EVAL_PERIOD) - 1
                if number == kill_in:
                    raise Killed
                calls.append(number)
                return {"bbox": {"AP": values[number], "AP50": 1.0}}

        keys = {
            "DATALOADER.NUM_WORKERS": 0,
            "DATASETS.TEST": "('judged',)",
            "DATASETS.TRAIN": "('judged',)",
            "MODEL.DEVICE": "cpu",
            "MODEL.ROI_HEADS.NUM_CLASSES": 2,
            "MODEL.WEIGHTS": "",
            "OUTPUT_DIR": folder,
            "SEED": 3,
            "SOLVER.CHECKPOINT_PERIOD": EVAL_PERIOD,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": max_iter,
            "SOLVER.STEPS": "()",
            "SOLVER.WARMUP_ITERS": 0,
            "TEST.EVAL_PERIOD": EVAL_PERIOD,
        }
        given = [part for pair in keys.items() for part in pair]
        cfg = load_config("", [str(part) for part in (*given, *options)])
        folder.mkdir(exist_ok=True)
        check_config(cfg, train=True)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return calls

    return run
