"""The best checkpoint and early stopping, in trainings that are killed and resumed."""

import argparse
import json
import logging
import math
import shutil
import time

import pytest
import torch
import yaml

from balanced_d2 import load_config
from balanced_d2.checkpoint import trainer_state
from balanced_d2.config.checks import check_config
from balanced_d2.config.resume import changes
from balanced_d2.engine import config_from
from balanced_d2.engine.after_evaluation import EarlyStopping
from balanced_d2.utils.errors import StopTraining, UserError

from .conftest import ROOT, TINY_CONFIG, Killed, assert_user_error, logged, needs_localhost
from .test_reliability import (
    ONE_THREAD,
    TORCHRUN,
    arguments,
    assert_same_weights,
    finish,
    start,
    weights,
)

BEST = ("TEST.BEST_CHECKPOINT.METRIC", "bbox/AP")
EARLY = ("SOLVER.EARLY_STOPPING.PATIENCE",)


def best_of(folder):
    state = trainer_state(str(folder / "model_best.pth"))
    return state["iteration"], state["hooks"]["ResumableBestCheckpointer"]


def model(path):
    return torch.load(path, weights_only=True)["model"]


def test_the_best_checkpoint(training, tmp_path):
    training(tmp_path, [10.0, 30.0, math.nan, 20.0, 30.0], *BEST)
    iteration, state = best_of(tmp_path)
    assert iteration == torch.load(tmp_path / "model_best.pth")["iteration"] == 3
    assert (state["best_metric"], state["best_iter"]) == (30.0, 3)
    assert_same_weights(model(tmp_path / "model_best.pth"), model(tmp_path / "model_0000003.pth"))
    training(tmp_path / "min", [30.0, 10.0, 20.0], *BEST, "TEST.BEST_CHECKPOINT.MODE", "min")
    assert best_of(tmp_path / "min")[0] == 3


def test_the_last_evaluation_can_be_the_best(training, tmp_path):
    """Training goes on from it as from the final checkpoint."""
    training(tmp_path, [10.0, 30.0], *BEST)
    assert best_of(tmp_path)[0] == 3
    (tmp_path / "last_checkpoint").write_text("model_best.pth")
    training(tmp_path, [10.0, 30.0, 5.0], *BEST, resume=True)
    training(tmp_path / "whole", [10.0, 30.0, 5.0], *BEST)
    assert best_of(tmp_path) == best_of(tmp_path / "whole")
    assert_same_weights(weights(tmp_path), weights(tmp_path / "whole"))


@pytest.mark.parametrize("kill_in", [0, 1, 2, 3])
def test_an_evaluation_that_was_killed_is_repeated(training, tmp_path, kill_in):
    """The checkpoint of the same iteration was written before it."""
    values = [10.0, 30.0, 20.0, 40.0]
    training(tmp_path / "whole", values, *BEST)
    with pytest.raises(Killed):
        training(tmp_path / "killed", values, *BEST, kill_in=kill_in)
    assert training(tmp_path / "killed", values, *BEST, resume=True) == list(range(kill_in, 4))
    assert best_of(tmp_path / "killed") == best_of(tmp_path / "whole")
    assert_same_weights(
        model(tmp_path / "killed" / "model_best.pth"), model(tmp_path / "whole" / "model_best.pth")
    )
    assert_same_weights(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_an_older_better_one_is_not_overwritten(training, tmp_path):
    """Also not after going back to a checkpoint of before, from where it becomes worse."""
    training(tmp_path, [10.0, 30.0, 20.0, 25.0], *BEST)
    kept = (tmp_path / "model_best.pth").read_bytes()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    rate = ("SOLVER.BASE_LR", "0.001")
    assert training(tmp_path, [10.0, 15.0, 29.0, 25.0], *BEST, *rate, resume=True) == [0, 1, 2, 3]
    assert (tmp_path / "model_best.pth").read_bytes() == kept
    state = torch.load(tmp_path / "model_final.pth")["trainer"]["hooks"]
    assert state["ResumableBestCheckpointer"]["best_metric"] == 30.0
    # Another metric is another question.
    other = ("TEST.BEST_CHECKPOINT.METRIC", "bbox/AP50")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    training(tmp_path, [10.0, 30.0, 20.0, 25.0], *other, resume=True)
    assert best_of(tmp_path)[1]["best_iter"] == 3


def test_off_by_default(training, tmp_path):
    assert training(tmp_path, [3.0, 1.0, 1.0]) == [0, 1, 2]
    assert not (tmp_path / "model_best.pth").exists()
    assert torch.load(tmp_path / "model_final.pth")["trainer"].get("hooks", {}).keys() <= {
        "LRScheduler"
    }
    # Nor is anything evaluated again after the checkpoint of an evaluation.
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert training(tmp_path, [3.0, 1.0, 1.0], resume=True) == [2]


def test_a_metric_that_is_not_there(training, tmp_path):
    with pytest.raises(StopTraining) as stopped:
        training(tmp_path, [1.0, 2.0, 3.0], BEST[0], "bbox/AP_50")
    message = str(stopped.value)
    assert "'bbox/AP_50', but the evaluation gave: bbox/AP, bbox/AP50." in message
    assert "saved as model_0000001.pth" in message and stopped.value.exit_code == 2
    assert training(tmp_path, [1.0, 2.0, 3.0], *BEST, resume=True) == [0, 1, 2]
    assert best_of(tmp_path)[0] == 5
    with pytest.raises(StopTraining, match="SOLVER.EARLY_STOPPING.METRIC is 'segm/AP'"):
        training(tmp_path / "b", [1.0] * 3, *EARLY, 1, "SOLVER.EARLY_STOPPING.METRIC", "segm/AP")


# Early stopping


def reference(values, patience, min_change, maximum):
    """After which evaluation training stops, from the definition: the last ``patience`` values are
    all no improvement on the best value before each of them."""
    for end in range(1, len(values) + 1):
        improved, best = [], None
        for value in values[:end]:
            better = best is None or (
                value > best + min_change if maximum else value < best - min_change
            )
            improved.append(better)
            best = value if better else best
        if end >= patience and not any(improved[end - patience :]):
            return end
    return None


@pytest.mark.parametrize("maximum", [True, False])
@pytest.mark.parametrize("min_change", [0.0, 0.5])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_when_it_stops(patience, min_change, maximum):
    generator = torch.Generator().manual_seed(patience)
    for _ in range(100):
        values = (torch.randint(0, 8, (10,), generator=generator) / 4).tolist()
        hook = EarlyStopping(1, None, "m", patience, "max" if maximum else "min", min_change)
        stopped = None
        for number, value in enumerate(values):
            hook.values[number] = value
            if hook.reason():
                stopped = number + 1
                break
        assert stopped == reference(values, patience, min_change, maximum)


def test_no_value_is_no_improvement():
    hook = EarlyStopping(1, None, "m", 2)
    hook.values = {0: math.nan, 1: 1.0, 2: math.nan}
    assert not hook.reason() and hook.progress() == (1.0, 1, 1)
    hook.values[3] = math.inf
    assert not EarlyStopping(1, None, "m", 2).reason()


VALUES = [10.0, 30.0, 20.0, 29.0, 31.0, 1.0]


def test_stopping_early(training, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    calls = training(tmp_path, VALUES, *EARLY, 2, *BEST)
    assert calls == [0, 1, 2, 3]  # the last of which counts as the final one
    assert (
        "stopped early after iteration 7: bbox/AP has not improved in 2 evaluations" in caplog.text
    )
    assert "best with 30.0000 after iteration 3" in caplog.text
    assert "Traceback" not in caplog.text
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == final["trainer"]["iteration"] == 7
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert best_of(tmp_path)[0] == 3
    assert logged(tmp_path)[-1]["bbox/AP"] == 29.0

    # Resumed with the same settings, it says so and ends.
    caplog.clear()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    assert training(tmp_path, VALUES, *EARLY, 2, *BEST, resume=True) == []
    assert "has been stopped early" in caplog.text
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == before

    # With other settings, it goes on as if they had been there from the beginning.
    assert training(tmp_path, VALUES, *EARLY, 3, *BEST, resume=True) == [4, 5]
    training(tmp_path / "whole", VALUES, *EARLY, 3, *BEST)
    assert_same_weights(weights(tmp_path), weights(tmp_path / "whole"))
    assert best_of(tmp_path) == best_of(tmp_path / "whole")


@pytest.mark.parametrize("kill_in", [2, 3])
def test_early_stopping_of_a_killed_training(training, tmp_path, kill_in):
    training(tmp_path / "whole", VALUES, *EARLY, 2)
    with pytest.raises(Killed):
        training(tmp_path / "killed", VALUES, *EARLY, 2, kill_in=kill_in)
    calls = training(tmp_path / "killed", VALUES, *EARLY, 2, resume=True)
    assert calls == list(range(kill_in, 4))
    states = [
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("whole", "killed")
    ]
    assert states[0]["trainer"]["hooks"] == states[1]["trainer"]["hooks"]
    assert_same_weights(states[0]["model"], states[1]["model"])


@pytest.mark.parametrize(
    "options, message",
    [
        (("SOLVER.EARLY_STOPPING.PATIENCE", "2", "TEST.EVAL_PERIOD", "0"), "TEST.EVAL_PERIOD"),
        ((*BEST, "DATASETS.TEST", "()"), "set DATASETS.TEST"),
        ((*BEST, "TEST.BEST_CHECKPOINT.MODE", "most"), "TEST.BEST_CHECKPOINT.MODE 'most'"),
        (("SOLVER.EARLY_STOPPING.PATIENCE", "-1"), "PATIENCE is -1"),
        (("SOLVER.EARLY_STOPPING.MIN_CHANGE", "-0.1"), "MIN_CHANGE -0.1"),
    ],
)
def test_settings_that_cannot_be(options, message):
    base = ["DATASETS.TEST", "('x',)", "TEST.EVAL_PERIOD", "5"]
    with pytest.raises(UserError, match=message):
        check_config(load_config(str(ROOT / TINY_CONFIG), [*base, *options]), train=True)


def test_settings_may_change_when_a_training_is_resumed():
    options = [
        *("SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.9", "SOLVER.ACCUMULATE", "2"),
        *("SOLVER.EARLY_STOPPING.PATIENCE", "2", "TEST.BEST_CHECKPOINT.METRIC", "bbox/AP"),
        *("MLFLOW.ENABLED", "True"),
    ]
    found = changes(load_config("").dump(), load_config("", options))
    assert set(found.applied) == set(options[::2]) and not found.refused
    # A training of before these keys has them off.
    before = yaml.safe_load(load_config("").dump())
    for section, key in (("SOLVER", "EMA"), ("SOLVER", "ACCUMULATE"), ("TEST", "BEST_CHECKPOINT")):
        del before[section][key]
    assert not changes(yaml.safe_dump(before), load_config("")).applied


# As users call it

REAL = (
    *("DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3", "SOLVER.MAX_ITER", "9"),
    *(*BEST, "SOLVER.EARLY_STOPPING.PATIENCE", "1", "SOLVER.EARLY_STOPPING.MIN_CHANGE", "200.0"),
)


@pytest.fixture(scope="module")
def stopped(tiny_coco, tmp_path_factory):
    """No change of AP exceeds 200, so that it stops after the second evaluation."""
    output = tmp_path_factory.mktemp("stopped") / "output"
    returncode, text = finish(arguments(tiny_coco, output, *REAL))
    assert returncode == 0, text
    assert "stopped early after iteration 5: bbox/AP has not improved by more than 200 in 1" in text
    assert "Traceback" not in text and "error:" not in text
    return output


@pytest.mark.slow
def test_killed_with_early_stopping_and_resumed(stopped, tiny_coco, tmp_path):
    output = tmp_path / "output"
    process, _ = start(arguments(tiny_coco, output, *REAL))
    while not (output / "model_0000002.pth").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()  # before, in or after the evaluation
    process.wait()
    returncode, text = finish(["--resume", *arguments(tiny_coco, output, *REAL)])
    assert returncode == 0, text
    assert_same_weights(weights(output), weights(stopped))
    assert best_of(output) == best_of(stopped)


@pytest.mark.slow
def test_weights_that_are_called_best(stopped, tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    shutil.copytree(stopped, output)
    detections = output / "inference" / "coco_instances_results.json"
    detections.unlink()
    best = ["MODEL.WEIGHTS", "best"]
    result = train_net_here("--eval-only", *arguments(tiny_coco, output, *REAL, *best))
    assert result.returncode == 0, result.stderr
    assert f"MODEL.WEIGHTS best: {output / 'model_best.pth'}" in result.stdout
    assert json.loads(detections.read_text()) is not None
    # Demo, export and the other programs begin like this.
    args = argparse.Namespace(
        config_file=str(output / "config.yaml"),
        register=[],
        opts=[*best, "OUTPUT_DIR", str(output)],
    )
    assert str(output / "model_best.pth") == config_from(args).MODEL.WEIGHTS
    elsewhere = arguments(tiny_coco, tmp_path / "none", *REAL, *best)
    assert_user_error(
        train_net_here("--eval-only", *elsewhere), "there is no", "TEST.BEST_CHECKPOINT.METRIC"
    )


@needs_localhost
@pytest.mark.slow
def test_several_processes_stop_together(tiny_coco, tmp_path):
    """With averaged weights and gradients that accumulate."""
    output = tmp_path / "output"
    options = (*REAL, "SOLVER.EMA.ENABLED", "True", "SOLVER.IMS_PER_BATCH", "4")
    options += ("SOLVER.ACCUMULATE", "2")
    returncode, text = finish(arguments(tiny_coco, output, *options), TORCHRUN, env=ONE_THREAD)
    assert returncode == 0, text
    assert "stopped early after iteration 5" in text
    final = torch.load(output / "model_final.pth", weights_only=True)
    assert final["iteration"] == 5 and final["model_ema"]["num_updates"] == 6
    returncode, text = finish(
        ["--resume", *arguments(tiny_coco, output, *options)], TORCHRUN, env=ONE_THREAD
    )
    assert returncode == 0, text
    assert "has been stopped early" in text and "Starting training" not in text
