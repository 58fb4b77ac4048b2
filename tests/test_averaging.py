"""The moving average of the weights: its numbers, its checkpoints, and who loads it."""

import copy
import json
import logging
import time

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from balanced_d2 import load_config
from balanced_d2.checkpoint import load_weights, start_from
from balanced_d2.config.checks import check_config
from balanced_d2.engine.averaging import AveragedWeights, AverageWeights
from balanced_d2.modeling.fold_norm import fold_norm
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, Killed, Small
from .test_reliability import (
    arguments,
    assert_same_weights,
    finish,
    start,
)

EMA = ("SOLVER.EMA.ENABLED", "True")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        FrozenBatchNorm2d(4),
        nn.Linear(4, 4).requires_grad_(False),
    )


def change(model):
    """As a step of training does, with other numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model[1](torch.randn(2, 4, 5, 5))  # its statistics


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.999])
def test_the_average(decay):
    model = network().train()
    averaged = AveragedWeights(model, decay)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(40):
        change(model)
        averaged.update()
        kept = min(decay, (1.0 + step) / (10.0 + step))
        for name, value in model.state_dict().items():
            expected[name] = kept * expected[name] + (1 - kept) * value.double()
    state = averaged.state_dict()
    assert state["num_updates"] == 40 and list(state["model"]) == list(model.state_dict())
    for name, value in state["model"].items():
        now = model.state_dict()[name]
        assert value.dtype == now.dtype
        if name == "1.num_batches_tracked":
            assert value == now == 40
        elif name[0] in "34":  # frozen
            assert torch.equal(value, now)
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
            assert decay == 0 or not torch.equal(value, now)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_model_has_it_only_where_it_is_applied(fold, memory_format):
    model = nn.Sequential(Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4))).to(memory_format=memory_format)
    plain = copy.deepcopy(model).eval()
    if fold:
        fold_norm(model)
    averaged = AveragedWeights(model, 0.9)
    image = torch.randn(2, 3, 8, 8)
    for _ in range(5):
        model.train()(image).square().sum().backward()
        with torch.no_grad():
            model[0].weight.add_(model[0].weight.grad, alpha=-0.01)
        averaged.update()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        trained = model(image)
        plain.load_state_dict(before)
        torch.testing.assert_close(trained, plain(image))
        plain.load_state_dict(copy.deepcopy(averaged.state_dict()["model"]))
        with pytest.raises(KeyError), averaged.applied():
            torch.testing.assert_close(model(image), plain(image))
            assert not torch.allclose(model(image), trained)
            raise KeyError
        assert torch.equal(model(image), trained)
    assert_same_weights(before, model.state_dict())
    assert_same_weights(averaged.state_dict()["model"], plain.state_dict())
    assert averaged.weights["0.weight"].is_contiguous(memory_format=memory_format)


def test_state_of_another_model():
    state = AveragedWeights(nn.Linear(2, 2), 0.9).state_dict()
    with pytest.raises(UserError, match="another model: weight"):
        AveragedWeights(nn.Linear(3, 2), 0.9).load_state_dict(state)


def read(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def test_killed_and_resumed(training, tmp_path):
    options = (*EMA, "SOLVER.EMA.DECAY", "0.7", "TEST.BEST_CHECKPOINT.METRIC", "bbox/AP")
    values = [1.0, 2.0, 3.0, 1.0]
    training(tmp_path / "whole", values, *options)
    with pytest.raises(Killed):
        training(tmp_path / "killed", values, *options, kill_in=2)
    training(tmp_path / "killed", values, *options, resume=True)
    for name in ("model_final", "model_best"):
        whole, killed = (read(tmp_path / folder, name) for folder in ("whole", "killed"))
        assert_same_weights(whole["model"], killed["model"])
        assert_same_weights(whole["model_ema"]["model"], killed["model_ema"]["model"])
        assert not torch.equal(
            whole["model"]["layer.weight"], whole["model_ema"]["model"]["layer.weight"]
        )
        assert killed["model_ema"]["num_updates"] == whole["iteration"] + 1
        assert "evaluated" in whole["model_ema"]["about"]
    # Averaging does not change what is trained.
    training(tmp_path / "without", values)
    assert_same_weights(read(tmp_path / "without")["model"], read(tmp_path / "whole")["model"])
    assert "model_ema" not in read(tmp_path / "without")


def test_turned_on_and_off_when_resumed(training, tmp_path):
    values, every = [1.0, 2.0, 3.0], ("SOLVER.CHECKPOINT_PERIOD", "1")
    training(tmp_path, values, *every)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    training(tmp_path, values, *every, *EMA, "SOLVER.EMA.DECAY", "0.25", resume=True)
    average = read(tmp_path, "model_0000001")["model"]["layer.bias"].double()
    for number in range(4):
        kept = min(0.25, (1 + number) / (10 + number))
        now = read(tmp_path, f"model_{number + 2:07d}")["model"]["layer.bias"]
        average = kept * average + (1 - kept) * now.double()
    got = read(tmp_path)["model_ema"]
    assert got["num_updates"] == 4
    torch.testing.assert_close(got["model"]["layer.bias"].double(), average, rtol=1e-6, atol=0)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    training(tmp_path, values, resume=True)
    assert "model_ema" not in read(tmp_path)


def test_the_average_begins_with_the_weights_that_training_begins_with():
    model = nn.Linear(1, 1)
    averaged = AveragedWeights(model, 0.9)
    hook = AverageWeights(averaged)
    nn.init.constant_(model.weight, 5.0)  # loaded
    hook.before_train()
    assert averaged.weights["weight"] == 5
    hook.after_step()
    nn.init.constant_(model.weight, 7.0)
    hook.before_train()  # of a training that was resumed
    assert averaged.weights["weight"] == 5


def test_which_weights_are_loaded(training, tmp_path, caplog):
    training(tmp_path, [1.0, 2.0], *EMA)
    caplog.set_level(logging.INFO, "balanced_d2")
    path = str(tmp_path / "model_final.pth")
    saved = read(tmp_path)
    for load in (load_weights, start_from):
        model = Small()
        caplog.clear()
        load(model, path, averaged=True)
        assert_same_weights(model.state_dict(), saved["model_ema"]["model"])
        assert "loading its averaged weights" in caplog.text
        caplog.clear()
        load(model, path)
        assert_same_weights(model.state_dict(), saved["model"])
        assert "weights as they were trained; SOLVER.EMA.ENABLED True" in caplog.text
    training(tmp_path / "without", [1.0])
    caplog.clear()
    load_weights(model, str(tmp_path / "without" / "model_final.pth"), averaged=True)
    assert "has no averaged weights" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (("SOLVER.EMA.DECAY", "1.0"), "DECAY is 1.0"),
        (("SOLVER.EMA.DECAY", "-0.1"), "DECAY is -0.1"),
        ((*EMA, "TEST.PRECISE_BN.ENABLED", "True"), "turn one off"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        check_config(load_config(str(ROOT / TINY_CONFIG), options), train=True)


# As users call it

REAL = (
    *(*EMA, "SOLVER.EMA.DECAY", "0.9", "DATASETS.TEST", "('tiny',)", "SOLVER.MAX_ITER", "8"),
    *("MODEL.FOLD_NORM", "True", "MODEL.CHANNELS_LAST", "True", "SOLVER.AMP.ENABLED", "True"),
    *("SOLVER.ACCUMULATE", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
)


@pytest.fixture(scope="module")
def averaged(tiny_coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("averaged") / "output"
    returncode, text = finish(arguments(tiny_coco, output, *REAL))
    assert returncode == 0, text
    assert "evaluating the averaged weights" in text
    return output


@pytest.mark.slow
def test_killed_with_everything_on(averaged, tiny_coco, tmp_path):
    """Averages, folded norms, channels last, mixed precision and gradients that accumulate."""
    output = tmp_path / "output"
    process, _ = start(arguments(tiny_coco, output, *REAL))
    while not (output / "model_0000002.pth").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    returncode, text = finish(["--resume", *arguments(tiny_coco, output, *REAL)])
    assert returncode == 0, text
    whole, killed = read(averaged), read(output)
    assert_same_weights(whole["model"], killed["model"])
    assert_same_weights(whole["model_ema"]["model"], killed["model_ema"]["model"])


@pytest.mark.slow
def test_evaluation_repeats_that_of_the_training(averaged, tiny_coco, tmp_path, train_net_here):
    def detections(folder):
        return json.loads((folder / "inference" / "coco_instances_results.json").read_text())

    weights_of = ["MODEL.WEIGHTS", averaged / "model_final.pth"]
    for name, options in (("same", ()), ("trained", ("SOLVER.EMA.ENABLED", "False"))):
        result = train_net_here(
            "--eval-only", *arguments(tiny_coco, tmp_path / name, *REAL, *weights_of, *options)
        )
        assert result.returncode == 0, result.stderr
    assert detections(averaged) == detections(tmp_path / "same")
    assert detections(averaged) != detections(tmp_path / "trained")
