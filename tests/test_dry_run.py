"""train_net.py --dry-run: everything is tried, nothing is written, and the forecast adds up."""

import re
import tempfile

import pytest
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from torch import nn

from balanced_d2.config.lazy import read_config
from balanced_d2.engine.dry_run import Forecast, num_checkpoints, num_evaluations, set_apart

from .conftest import ROOT, TINY_MODEL, assert_user_error, needs_localhost
from .test_reliability import ONE_THREAD, TORCHRUN, arguments, finish

LAZY = "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.py"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def options(json_file, output, *more):
    return [
        *("--dry-run", "--register", "tried", json_file, json_file.parent / "images", *TINY_MODEL),
        *("DATASETS.TRAIN", "('tried',)", "DATASETS.TEST", "('tried',)", "OUTPUT_DIR", output),
        *("SOLVER.MAX_ITER", "3000", "SOLVER.CHECKPOINT_PERIOD", "1000"),
        *("TEST.EVAL_PERIOD", "500", "DATALOADER.NUM_WORKERS", "0", *more),
    ]


def assert_forecast(text, num_iterations, num_evaluations, num_checkpoints):
    assert re.search(r"dry run, from \d iterations of [\d.e-]+ to [\d.e-]+ s:", text)
    assert f"{num_iterations:,} iterations of " in text
    assert f"{num_evaluations} evaluation(s) of " in text
    assert f"on disk for {num_checkpoints} checkpoint(s)" in text
    assert re.search(r"[\d.]+ GiB of memory", text)


def test_a_yaml_config(tiny_coco, tmp_path, temporary, train_net_here):
    output = tmp_path / "output"
    # All that writes, and all that ends a training, is on, but does not.
    more = ["TEST.BEST_CHECKPOINT.METRIC", "bbox/nowhere", "SOLVER.EMA.ENABLED", "True"]
    more += ["SOLVER.EARLY_STOPPING.PATIENCE", "1", "SOLVER.ACCUMULATE", "2"]
    result = train_net_here(*options(tiny_coco, output, *more))
    assert result.returncode == 0, result.stderr
    assert_forecast(result.stdout, 3000, 6, 5)
    assert "evaluating 4 batch(es) of tried" in result.stdout
    wrong = "TEST.BEST_CHECKPOINT.METRIC is 'bbox/nowhere', but the evaluation gave: bbox/AP, "
    assert wrong in result.stdout + result.stderr
    assert "SOLVER.EARLY_STOPPING.METRIC is" not in result.stdout + result.stderr
    assert not output.exists() and not list(temporary.iterdir())


def test_what_a_training_refuses(tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    wrong = options(tiny_coco, output, "MODEL.ROI_HEADS.NUM_CLASSES", "3")
    assert_user_error(train_net_here(*wrong), "NUM_CLASSES is 3")
    for other in ("--resume", "--eval-only"):
        assert_user_error(train_net_here(other, *options(tiny_coco, output)), f"leave {other} out")
    assert not output.exists()


WRITING = {"output_dir": "mine"}


@pytest.mark.parametrize("evaluator", [{}, WRITING, [{"kind": 1}, WRITING]])
def test_a_lazy_config_is_set_apart(temporary, evaluator):
    """Also where its evaluators write."""
    cfg = read_config(str(ROOT / LAZY), ["train.output_dir=mine"])
    cfg.lazy.dataloader.evaluator = evaluator
    set_apart(cfg)
    (folder,) = map(str, temporary.iterdir())
    assert {cfg.OUTPUT_DIR, cfg.lazy.train.output_dir} == {folder}
    assert "mine" not in str(cfg.lazy)


@pytest.mark.slow
def test_a_lazy_config(tiny_coco, tmp_path, temporary, train_net_here):
    output = tmp_path / "output"
    result = train_net_here(
        *("--dry-run", "--register", "tried", tiny_coco, tiny_coco.parent / "images"),
        *("dataloader.train.dataset.names=tried", "dataloader.test.dataset.names=tried"),
        *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
        *("dataloader.train.total_batch_size=2", "model.num_classes=2", "train.device=cpu"),
        *("dataloader.train.mapper.augmentations.0.short_edge_length=[64]", "train.max_iter=2"),
        *("dataloader.test.mapper.augmentations.0.short_edge_length=64", "train.eval_period=1"),
        *("train.init_checkpoint=''", f"train.output_dir={output}"),
        *("train.checkpointer.period=1", "train.checkpointer.max_to_keep=1"),
        config=LAZY,
    )
    assert result.returncode == 0, result.stderr
    assert_forecast(result.stdout, 2, 2, 2)
    assert not output.exists() and not list(temporary.iterdir())


@pytest.mark.slow
def test_beside_a_training(tiny_coco, tmp_path, temporary, train_net_here):
    """An OUTPUT_DIR that is used is refused as for a training; --overwrite moves nothing."""
    output = tmp_path / "output"
    run = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    assert train_net_here(*options(tiny_coco, output, *run)[1:]).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert_user_error(train_net_here(*options(tiny_coco, output)), "holds a training")
    result = train_net_here("--overwrite", *options(tiny_coco, output, *run))
    assert result.returncode == 0, result.stderr
    assert_forecast(result.stdout, 1, 0, 1)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "temporary"]


@needs_localhost
@pytest.mark.slow
def test_several_processes(tiny_coco, tmp_path):
    run = arguments(tiny_coco, tmp_path / "output", "SOLVER.MAX_ITER", "30")
    returncode, text = finish(["--dry-run", *run], TORCHRUN, env=ONE_THREAD)
    assert returncode == 0, text
    assert_forecast(text, 30, 0, 11)
    assert not (tmp_path / "output").exists()


def test_the_forecast_adds_up():
    forecast = Forecast(0.5, 7200, 60.0, 3, 3 * 2**29, 2**28, 6)
    assert forecast.seconds == 3600 + 180
    assert "1:03:00 for the whole training: 7,200 iterations of 0.5 s" in str(forecast)
    assert "1.5 GiB of memory" in str(forecast) and "1.5 GiB on disk" in str(forecast)


@pytest.mark.parametrize("num_iterations", range(1, 12))
@pytest.mark.parametrize("period", [0, 1, 2, 5])
def test_number_of_evaluations(num_iterations, period):
    due = {n for n in range(1, num_iterations) if period and n % period == 0}
    assert num_evaluations(num_iterations, period) == len(due | {num_iterations})


@pytest.mark.parametrize("num_iterations", range(1, 12))
@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("max_to_keep", [None, 1, 3])
def test_number_of_checkpoints(tmp_path, num_iterations, period, max_to_keep):
    checkpointer = PeriodicCheckpointer(
        Checkpointer(nn.Linear(1, 1), str(tmp_path)), period, num_iterations, max_to_keep
    )
    for iteration in range(num_iterations):
        checkpointer.step(iteration)
    left = list(tmp_path.glob("*.pth"))
    assert num_checkpoints(num_iterations, period, max_to_keep) == len(left)
