"""Interrupted training, damaged and malicious checkpoints, several processes."""

import contextlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from torch import nn

from balanced_d2.checkpoint import BalancedCheckpointer, check_space
from balanced_d2.checkpoint.unpickle import load_inert
from balanced_d2.data.datasets.coco import register_coco
from balanced_d2.data.loader import TrainLoader
from balanced_d2.evaluation import build_evaluator
from balanced_d2.utils.errors import StopTraining, UserError
from balanced_d2.utils.files import open_replacing
from balanced_d2.utils.randomness import seed_all, seeded

from .conftest import (
    ROOT,
    TINY_CONFIG,
    TINY_MODEL,
    assert_user_error,
    logged,
    needs_localhost,
    write_coco,
)

NUM_KILLS = int(os.environ.get("NUM_KILLS", "2"))


def arguments(json_file, output, *opts):
    return [
        *("--register", "tiny", json_file, json_file.parent / "images"),
        *(*TINY_MODEL, "DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()"),
        *("OUTPUT_DIR", output, "SEED", "1", "SOLVER.CHECKPOINT_PERIOD", "3"),
        *("SOLVER.MAX_ITER", "12", "SOLVER.IMS_PER_BATCH", "2", *opts),
    ]


def start(arguments, launcher=(sys.executable,), **kwargs):
    command = [*launcher, ROOT / "train_net.py", "--config-file", ROOT / TINY_CONFIG, *arguments]
    command = [str(part) for part in command]
    # Not a pipe: while a test waits for a file, nobody reads the pipe, and a full one blocks.
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **kwargs), log


def text_of(process, log, timeout=300):
    """The output of a process, once it has ended."""
    process.wait(timeout=timeout)
    log.seek(0)
    return log.read()


def finish(arguments, launcher=(sys.executable,), **kwargs):
    process, log = start(arguments, launcher, **kwargs)
    text = text_of(process, log)
    return process.returncode, text


def weights(output):
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def assert_same_weights(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def uninterrupted(tiny_coco, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "output"
    returncode, text = finish(arguments(tiny_coco, output))
    assert returncode == 0, text
    return output


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(NUM_KILLS))
def test_killed_and_resumed_ends_with_the_same_weights(uninterrupted, tiny_coco, tmp_path, kill):
    """Killed at a random moment, every second time while a checkpoint is being written, and resumed
    with another number of workers, which makes no difference."""
    chance = random.Random(kill)
    output = tmp_path / "output"
    workers = str(chance.randint(0, 2))
    process, _ = start(arguments(tiny_coco, output, "DATALOADER.NUM_WORKERS", workers))
    if kill % 2:
        number = chance.choice(("0000002", "0000005", "0000008", "0000011", "final"))
        names = (f"model_{number}.pth.partial", f"model_{number}.pth")
        while not any((output / name).exists() for name in names) and process.poll() is None:
            time.sleep(0.0002)
    else:
        while not (output / "metrics.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 4))
    process.kill()
    process.wait()
    for checkpoint in output.glob("*.pth"):
        assert torch.load(checkpoint, weights_only=True)["model"]

    returncode, text = finish(["--resume", *arguments(tiny_coco, output)])
    assert returncode == 0, text
    assert_same_weights(weights(output), weights(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(uninterrupted, tiny_coco, tmp_path, number):
    output = tmp_path / "output"
    # Long enough for the signal to come before the end.
    process, log = start(arguments(tiny_coco, output, "SOLVER.MAX_ITER", "100000"))
    while not (output / "model_0000002.pth").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    text = text_of(process, log, timeout=120)
    assert process.returncode == 128 + number, text
    assert "Traceback" not in text
    assert f"stopped by {number.name} after iteration" in text and "--resume continues" in text
    iteration = int(text.rsplit("after iteration ", 1)[1].split(":")[0])
    saved = torch.load(output / f"model_{iteration:07d}.pth", weights_only=True)
    assert (
        saved["iteration"] == iteration and saved["trainer"]["loader"]["position"] == iteration + 1
    )
    assert (output / "last_checkpoint").read_text() == f"model_{iteration:07d}.pth"


def test_damaged_checkpoints_are_skipped(uninterrupted, tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    shutil.copytree(uninterrupted, output)
    content = (output / "model_final.pth").read_bytes()
    (output / "model_final.pth").write_bytes(content[: len(content) // 2])
    (output / "model_0000011.pth").write_bytes(b"")
    (output / "last_checkpoint").write_text("")
    result = train_net_here("--resume", *arguments(tiny_coco, output))
    text = result.stdout
    assert result.returncode == 0, text
    for name in ("model_final.pth", "model_0000011.pth"):
        assert f"the checkpoint cannot be read: {output / name} (" in text
    assert "Starting training from iteration 9" in text
    assert_same_weights(weights(output), weights(uninterrupted))


def test_killed_after_the_last_iteration(uninterrupted, tiny_coco, tmp_path, train_net_here):
    """While the final weights were being written, with no iteration left to write them again."""
    output = tmp_path / "output"
    shutil.copytree(uninterrupted, output)
    (output / "model_final.pth").rename(output / "model_final.pth.partial")
    (output / "last_checkpoint").write_text("model_0000011.pth")
    result = train_net_here("--resume", *arguments(tiny_coco, output))
    assert result.returncode == 0, result.stdout
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    final, expected = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (output, uninterrupted)
    )
    assert_same_weights(final["model"], expected["model"])
    assert final["iteration"] == expected["iteration"] == 11
    assert final["trainer"]["iteration"] == expected["trainer"]["iteration"]
    assert final["trainer"]["loader"] == expected["trainer"]["loader"]
    written = (output / "model_final.pth").stat().st_mtime_ns
    assert train_net_here("--resume", *arguments(tiny_coco, output)).returncode == 0
    assert (output / "model_final.pth").stat().st_mtime_ns == written


def test_loss_that_is_not_finite(tiny_coco, tmp_path, train_net_here):
    output = tmp_path / "output"
    result = train_net_here(
        *arguments(tiny_coco, output),
        *("SOLVER.BASE_LR", "1e18", "SOLVER.WARMUP_ITERS", "0"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "False"),
    )
    assert result.returncode == 2
    assert_user_error(result, "error: iteration ", ".jpg", "Learning rate: ")
    assert not list(output.glob("*.pth"))


# Checkpoints


@pytest.fixture
def checkpointer(tmp_path):
    return BalancedCheckpointer(nn.Linear(2, 2), str(tmp_path))


def test_a_failing_write_leaves_the_old_file(checkpointer, tmp_path, monkeypatch):
    checkpointer.save("model", iteration=1)
    before = (tmp_path / "model.pth").read_bytes()

    def fail(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StopTraining, match="model.pth to .*: no space left on the disk; .*kept"):
        checkpointer.save("model", iteration=2)
    assert (tmp_path / "model.pth").read_bytes() == before


def test_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows: then only the file is written to disk at once."""

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as windows:
        windows.setattr(os, "open", refuse)
        windows.setattr(os, "name", "nt")
        with open_replacing(str(tmp_path / "a.json"), "w") as file:
            file.write("whole")
    assert (tmp_path / "a.json").read_text() == "whole"


def test_weights_that_are_not_finite_are_not_saved(checkpointer, tmp_path):
    checkpointer.save("good", iteration=1)
    checkpointer.model.weight.data[0, 0] = float("nan")
    with pytest.raises(StopTraining, match="bad was not saved: 1 of .* first is weight"):
        checkpointer.save("bad", iteration=2)
    assert not (tmp_path / "bad.pth").exists()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "good.pth")


def test_which_checkpoint_is_resumed(checkpointer, tmp_path, caplog):
    for iteration, name in ((7, "model_final"), (2, "model_0000002"), (5, "model_0000005")):
        checkpointer.save(name, iteration=iteration)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pretrained.pth")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000005.pth")
        assert not caplog.records
        # Without the file that last_checkpoint names: the one with the latest iteration.
        (tmp_path / "model_0000005.pth").write_bytes(b"")
        assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")
        assert "last_checkpoint names model_0000005.pth" in caplog.text
    (tmp_path / "last_checkpoint").unlink()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_final.pth")
    assert BalancedCheckpointer(nn.Linear(1, 1), str(tmp_path / "none")).get_checkpoint_file() == ""


def test_no_checkpoint_can_be_read(checkpointer, tmp_path):
    """Training from scratch would be mistaken for resumed training."""
    checkpointer.save("model_0000002", iteration=2)
    (tmp_path / "model_0000002.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="none of the checkpoints .*model_0000002.pth"):
        checkpointer.resume_or_load("", resume=True)
    checkpointer.resume_or_load("", resume=False)


def test_numpy_in_the_state_of_a_hook(checkpointer, tmp_path):
    state = {"best": np.float64(0.5), "step": np.int64(3), "seen": np.arange(3), "on": np.bool_(1)}
    checkpointer.save("model_0000002", iteration=2, hook=state)
    loaded = checkpointer.resume_or_load("", resume=True)["hook"]
    assert loaded.pop("seen").tolist() == [0, 1, 2]
    assert loaded == {"best": 0.5, "step": 3, "on": True}


def test_matching_heuristics(tmp_path):
    """Names with the same ending are matched, as for files of Detectron2's model zoo."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    torch.save({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, tmp_path / "x.pth")
    query = f"{tmp_path / 'x.pth'}?matching_heuristics=True"
    BalancedCheckpointer(model).resume_or_load(query, resume=False)
    assert all((parameter == 1).all() for parameter in model.parameters())
    with pytest.raises(UserError, match="cannot load the checkpoint"):
        BalancedCheckpointer(model).load(f"{tmp_path / 'x.pth'}?matching=True")


def test_no_space_and_no_permission(tmp_path):
    check_space(str(tmp_path / "new" / "folder"), 1)
    with pytest.raises(UserError, match="takes about .* MiB are free; make room"):
        check_space(str(tmp_path), 10**18)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to OUTPUT_DIR"):
        check_space(str(tmp_path / "file" / "folder"), 1)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("suffix", ["pth", "pkl", "legacy.pth"])
def test_no_code_in_a_checkpoint_is_run(suffix, tmp_path):
    trap, file = tmp_path / "trap", tmp_path / f"weights.{suffix}"
    content = {"model": {"weight": np.zeros((2, 2), np.float32)}, "__author__": Hostile(trap)}
    if suffix == "pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=suffix == "pth")
    with pytest.raises(UserError, match=f"weights.{suffix}"):
        BalancedCheckpointer(nn.Linear(2, 2)).load(str(file))
    assert not trap.exists()
    if suffix != "pkl":
        assert load_inert(str(file)).keys() == content.keys() and not trap.exists()


def test_pickled_arrays_are_read(tmp_path):
    file, model = tmp_path / "weights.pkl", nn.Linear(2, 3)
    arrays = {"weight": np.ones((3, 2), np.float32), "bias": np.arange(3, dtype=np.float32)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}, protocol))
        BalancedCheckpointer(model).load(str(file))
        assert model.bias.tolist() == [0, 1, 2] and model.weight.sum() == 6


# Loading of data


def records(num=10):
    sizes = [(60, 40) if i % 3 else (40, 60) for i in range(num)]
    return [
        {"file_name": f"{i}.jpg", "width": w, "height": h, "index": i}
        for i, (w, h) in enumerate(sizes)
    ]


def augment(record):
    return {**record, "chance": (random.random(), np.random.rand(), torch.rand(1).item())}


def take(loader, number):
    batches = iter(loader)
    return [next(batches) for _ in range(number)]


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_from_seed_and_position(grouping, num_workers):
    def loader(workers, seed=5):
        return TrainLoader(
            records(),
            mapper=augment,
            total_batch_size=3,
            num_workers=workers,
            aspect_ratio_grouping=grouping,
            seed=seed,
        )

    expected = take(loader(0), 12)
    seed_all(99)  # earlier draws make no difference
    assert take(loader(num_workers), 12) == expected
    assert take(loader(0, seed=6), 12) != expected
    for position in (1, 7):
        first = loader(num_workers)
        take(first, position)
        resumed = loader(num_workers, seed=77)
        resumed.load_state_dict(first.state_dict())
        assert take(resumed, 12 - position) == expected[position:]
    for batch in expected:
        if grouping:
            assert len({sample["width"] > sample["height"] for sample in batch}) == 1
    flat = [sample for batch in expected for sample in batch]
    assert len({sample["chance"] for sample in flat}) == len(flat)
    if not grouping:  # each image once per epoch
        assert sorted(sample["index"] for sample in flat[:10]) == list(range(10))


def test_loading_leaves_the_random_state_alone():
    loader = TrainLoader(records(), mapper=augment, total_batch_size=2, seed=1)
    seed_all(3)
    expected = torch.rand(3), np.random.rand(3), random.random()
    seed_all(3)
    take(loader, 4)
    got = torch.rand(3), np.random.rand(3), random.random()
    assert all(np.array_equal(a, b) for a, b in zip(got, expected))
    with seeded(1, 2):
        first = torch.rand(3), np.random.rand(3), random.random()
    with seeded(1, 3):
        assert not torch.equal(torch.rand(3), first[0])


def unreadable(record):
    if record["index"] in (2, 5):
        raise OSError(f"image file is truncated: {record['file_name']}")
    return record


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images(num_workers, caplog):
    def loader(**kwargs):
        return TrainLoader(
            records(), mapper=unreadable, total_batch_size=5, num_workers=num_workers, **kwargs
        )

    with pytest.raises(StopTraining, match="image [25].jpg: image file is truncated.*SKIP_BAD"):
        take(loader(), 2)
    batches = take(loader(skip_bad_images=True), 6)
    assert [len(batch) for batch in batches] == [5] * 6
    assert {sample["index"] for batch in batches for sample in batch} == {0, 1, 3, 4, 6, 7, 8, 9}
    assert caplog.text.count("skipped") == 2 and "2 of at most 100" in caplog.text
    with pytest.raises(StopTraining, match="more than 1 images cannot be read"):
        take(loader(skip_bad_images=True, max_bad_images=1), 4)


@pytest.mark.parametrize(
    "mapper, message",
    [
        (lambda record: Path(record["file_name"]).read_bytes(), r"such as \d.jpg: .*No such file"),
        (lambda record: None, "the mapper rejects every one"),
    ],
)
def test_images_that_are_all_bad(mapper, message):
    loader = TrainLoader(records(), mapper=mapper, total_batch_size=2, seed=1, skip_bad_images=True)
    with pytest.raises(StopTraining, match=f"none of the 10 images can be trained on: {message}"):
        take(loader, 1)


@pytest.mark.slow
def test_a_bad_image_in_training(tmp_path, train_net_here):
    json_file = write_coco(tmp_path / "data")
    image = json_file.parent / "images" / "3.jpg"
    image.write_bytes(image.read_bytes()[:200])
    result = train_net_here(*arguments(json_file, tmp_path / "output"))
    assert_user_error(result, str(image), "SKIP_BAD_IMAGES")
    result = train_net_here(
        *arguments(json_file, tmp_path / "output", "DATALOADER.SKIP_BAD_IMAGES", "True")
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("skipped (1 of at most 100)") == 1


def test_wrong_batch_size():
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH"):
        TrainLoader(records(), mapper=augment, total_batch_size=0)


@pytest.mark.slow
def test_normalizer_of_retinanet_is_part_of_the_checkpoint(tiny_coco, tmp_path, train_net_here):
    """Detectron2 keeps it as a running mean that is not a buffer."""
    output = tmp_path / "output"
    command = [
        *arguments(tiny_coco, output),
        *("MODEL.RETINANET.NUM_CLASSES", "2", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "SOLVER.BASE_LR", "0.0001"),
        *("SOLVER.MAX_ITER", "6", "SOLVER.STEPS", "()"),
    ]
    config = "configs/COCO-Detection/balanced_retinanet_R_50_FPN_1x.yaml"
    result = train_net_here(*command, config=config)
    assert result.returncode == 0, result.stderr
    expected = weights(output)
    for name in ("model_final.pth", "model_0000005.pth"):
        (output / name).unlink()
    result = train_net_here("--resume", *command, config=config)
    assert result.returncode == 0 and "Starting training from iteration 3" in result.stdout
    assert_same_weights(weights(output), expected)


# Evaluation


def test_nothing_detected_is_an_ap_of_zero(tiny_coco, tmp_path, caplog):
    register_coco("tiny_nothing", str(tiny_coco), str(tiny_coco.parent / "images"))
    try:
        DatasetCatalog.get("tiny_nothing")
        evaluator = build_evaluator("tiny_nothing", str(tmp_path))
        evaluator.reset()
        evaluator._predictions = [{"image_id": 1, "instances": []}]
        results = evaluator.evaluate()
    finally:
        DatasetCatalog.remove("tiny_nothing")
    assert set(results["bbox"].values()) == {0.0}


# Several processes


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
TORCHRUN += ("--local-addr", "127.0.0.1")  # this machine's name may have no address
# A process that is aborted by a library says where.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def losses(output):
    return [line for line in logged(output) if "total_loss" in line]


# With everything sampled, losses do not depend on chance.
ALL_SAMPLED = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4000", "MODEL.RESNETS.NORM", "FrozenBN"),
    *("SOLVER.MAX_ITER", "3", "SOLVER.BASE_LR", "0.001"),
    *("DATALOADER.ASPECT_RATIO_GROUPING", "False"),
]


def train_in_one_and_two_processes(tiny_coco, tmp_path, *opts):
    for name, launcher in (("one", (sys.executable,)), ("two", TORCHRUN)):
        command = arguments(tiny_coco, tmp_path / name, *ALL_SAMPLED, *opts)
        returncode, text = finish(command, launcher, env=ONE_THREAD)
        assert returncode == 0, text


@needs_localhost
@pytest.mark.slow
def test_two_processes_train_as_one(tiny_coco, tmp_path):
    evaluated = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "-1.0", "DATASETS.TEST", "('tiny',)"]
    train_in_one_and_two_processes(tiny_coco, tmp_path, *evaluated)
    one, two = (losses(tmp_path / name)[-1]["total_loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=0.03)
    assert not list((tmp_path / "two").glob("**/*rank1*.pth"))

    # Evaluated by two processes, the first model gives the same detections.
    evaluation = [
        "--eval-only",
        *arguments(tiny_coco, tmp_path / "evaluated", *ALL_SAMPLED, *evaluated),
    ]
    weights_of_one = ["MODEL.WEIGHTS", tmp_path / "one" / "model_final.pth"]
    returncode, text = finish([*evaluation, *weights_of_one], TORCHRUN, env=ONE_THREAD)
    assert returncode == 0, text[-8000:]
    expected, got = (
        json.loads((tmp_path / name / "inference/coco_instances_results.json").read_text())
        for name in ("one", "evaluated")
    )

    def in_order(detections):
        return sorted(detections, key=lambda d: (d["image_id"], -d["score"], d["bbox"]))

    assert expected and in_order(got) == in_order(expected)


@needs_localhost
@pytest.mark.slow
def test_two_processes_train_as_one_with_a_class_loss(tiny_coco, tmp_path):
    """Seesaw loss, whose counts are those of all processes: equal until weights differ."""
    seesaw = ["MODEL.ROI_BOX_HEAD.CLS_LOSS_TYPE", "seesaw", "SOLVER.BASE_LR", "1e-6"]
    train_in_one_and_two_processes(tiny_coco, tmp_path, *seesaw)
    for line in zip(*(losses(tmp_path / name) for name in ("one", "two"))):
        one, two = (values["total_loss"] for values in line)
        assert two == pytest.approx(one, rel=0.03)
    one, two = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("one", "two")
    )
    counts = "roi_heads.box_predictor.classification_loss.counts"
    assert one[counts].sum() > 500 and one[counts].min() > 0
    assert torch.equal(one[counts], two[counts])


def children(parent):
    """The processes that a process has started, found without tools that may not be installed."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            # The name, in brackets, can contain anything.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                pids.append(int(stat.parent.name))
    return sorted(pids)


@needs_localhost
@pytest.mark.slow
def test_torchrun_restarts_and_resumes(tiny_coco, tmp_path):
    """A worker is killed; torchrun restarts all, and they resume from the last checkpoint."""
    output = tmp_path / "output"
    launcher = (*TORCHRUN, "--max-restarts", "1", "--monitor-interval", "0.1")
    process, log = start(
        arguments(tiny_coco, output, "SOLVER.MAX_ITER", "40"), launcher, env=ONE_THREAD
    )
    while not (output / "model_0000005.pth").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    text = text_of(process, log)
    assert process.returncode == 0, text
    starts = [line for line in text.splitlines() if "Starting training from iteration" in line]
    assert len(starts) == 2 and int(starts[1].rsplit(" ", 1)[1]) >= 6
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 39


@needs_localhost
@pytest.mark.slow
def test_wrong_number_of_processes(tiny_coco, tmp_path):
    command = arguments(tiny_coco, tmp_path, "SOLVER.IMS_PER_BATCH", "3")
    returncode, text = finish(command, TORCHRUN, env=ONE_THREAD)
    assert returncode != 0
    assert (
        "SOLVER.IMS_PER_BATCH) is 3; it has to be a multiple of the number of processes, 2" in text
    )
