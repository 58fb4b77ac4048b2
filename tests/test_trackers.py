"""MLflow and Weights & Biases, both without a network."""

import json
import logging
import os
import struct
import sys

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from balanced_d2 import load_config
from balanced_d2.config.checks import check_config
from balanced_d2.data.image import read_image
from balanced_d2.engine.wandb import WandbWriter
from balanced_d2.utils.errors import UserError

from .conftest import ROOT, TINY_CONFIG, Killed


@pytest.fixture
def mlflow(monkeypatch):
    """The package; its folder of files needs no further package and no server."""
    package = pytest.importorskip("mlflow", reason="needs the package mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(logging.getLogger("mlflow"), "level", logging.ERROR)
    return package


def test_mlflow(mlflow, training, tmp_path):
    uri = (tmp_path / "runs").as_uri()
    options = ("MLFLOW.ENABLED", "True", "MLFLOW.URI", uri, "MLFLOW.EXPERIMENT", "cells")
    options += ("MLFLOW.NAME", "first", "SOLVER.BASE_LR", "0.002")
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.yaml").write_text("SEED: 3\n")
    with pytest.raises(Killed):
        training(output, [1.0, 2.0, 3.0], *options, kill_in=1)
    client = mlflow.MlflowClient(tracking_uri=uri)

    def run():
        (experiment,) = client.search_experiments(filter_string="name = 'cells'")
        (only,) = client.search_runs([experiment.experiment_id])
        return only

    first = run()
    assert first.info.run_name == "first" and first.info.status == "FAILED"
    assert first.data.params["SOLVER.BASE_LR"] == "0.002"
    assert first.data.params["DATASETS.TRAIN"] == "['judged']"
    assert len(first.data.params) > 200
    assert [file.path for file in client.list_artifacts(first.info.run_id)] == ["config.yaml"]

    # Resumed, it goes on in the same run.
    training(output, [1.0, 2.0, 3.0], *options, resume=True)
    assert run().info.run_id == first.info.run_id and run().info.status == "FINISHED"
    history = client.get_metric_history(first.info.run_id, "bbox/AP")
    assert (history[-1].value, history[-1].step) == (3.0, 6)
    assert "loss" in run().data.metrics or "total_loss" in run().data.metrics
    # Begun again, it is another run.
    training(output, [1.0], *options[:6])
    (experiment,) = client.search_experiments(filter_string="name = 'cells'")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_mlflow_that_cannot_be_reached(mlflow, training, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "balanced_d2")
    (tmp_path / "file").write_text("")
    options = ("MLFLOW.ENABLED", "True", "MLFLOW.URI", (tmp_path / "file" / "x").as_uri())
    training(tmp_path / "output", [1.0, 2.0], *options)
    assert caplog.text.count("training goes on without it") == 1
    assert (tmp_path / "output" / "model_final.pth").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("balanced_d2.utils.errors.importlib.util.find_spec", lambda name: None)
    key = f"{name.upper()}.ENABLED"
    with pytest.raises(UserError, match=f"{key} needs .* run: pip install {name}$"):
        check_config(load_config(str(ROOT / TINY_CONFIG), [key, "True"]), train=True)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The package, offline."""
    package = pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield package
    package.teardown()


def stored(log):
    """The records of an offline run. Its file is a log of LevelDB after a header of 7 bytes: blocks
    of 32 KiB, with pieces of records, each after 4 bytes of checksum, 2 of length and 1 of type."""
    content, position, record = log.read_bytes(), 7, b""
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:  # padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last piece
            yield record
            record = b""


def records_of(log):
    """Of an offline run: its name, the SOLVER of its config, its rows and its exit code."""
    from wandb.proto.wandb_internal_pb2 import Record

    kinds = {}
    for content in stored(log):
        record = Record.FromString(content)
        kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
    (run,) = kinds["run"]
    config = {u.key: json.loads(u.value_json) for u in run.run.config.update}
    rows = [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in kinds["history"]
    ]
    return run.run.display_name, config.get("SOLVER"), rows, kinds["exit"][0].exit.exit_code


@pytest.mark.slow
def test_wandb(wandb, training, tmp_path):
    output = tmp_path / "output"
    options = ("WANDB.ENABLED", "True", "WANDB.NAME", "first")
    with pytest.raises(Killed):
        training(output, [1.0, 2.0, 3.0], *options, kill_in=1)
    wandb.teardown()  # writes what it still has
    (first,) = (output / "wandb").glob("offline-run-*")
    run_id = first.name.rpartition("-")[2]
    name, solver, rows, code = records_of(first / f"run-{run_id}.wandb")
    assert (name, solver["BASE_LR"], code) == ("first", 0.001, 1)

    # Resumed, it goes on in the same run.
    training(output, [1.0, 2.0, 3.0], *options, "SOLVER.BASE_LR", "0.002", resume=True)
    wandb.teardown()
    _, second = sorted((output / "wandb").glob("offline-run-*"), key=os.path.getmtime)
    assert second != first and second.name.rpartition("-")[2] == run_id
    _, solver, rows, code = records_of(second / f"run-{run_id}.wandb")
    assert (solver["BASE_LR"], code) == (0.002, 0)
    rows = {row["iteration"]: row for row in rows}
    assert rows[6]["bbox/AP"] == 3.0 and min(rows) > 2
    assert set(rows[6]) >= {"bbox/AP", "bbox/AP50"}
    # Begun again, it is another run.
    training(output, [1.0], *options)
    assert (output / "wandb_run_id").read_text() != run_id
    assert len(list((output / "wandb").glob("offline-run-*"))) == 3


@pytest.mark.slow
def test_wandb_receives_what_tensorboard_does(wandb, tmp_path):
    writer = WandbWriter(str(tmp_path), "project")
    with EventStorage(4) as storage:
        storage.put_scalars(loss=2.5)
        storage.put_image("shown", np.full((3, 4, 5), 7, np.uint8))
        storage.put_histogram("weights", torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=4)
        writer.write()
        assert len(storage._vis_data) == 1  # left to TensorBoard
        writer.write()  # nothing new
    writer.close()
    wandb.teardown()  # writes what it still has
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    *_, (row,), code = records_of(log)
    assert (row["loss"], row["iteration"], code) == (2.5, 4, 0)
    assert row["weights.values"] == [1, 2, 0, 1] and row["weights.bins"] == [0, 1, 2, 3, 4]
    assert (row["shown.height"], row["shown.width"]) == (4, 5)
    picture = read_image(str(log.parent / "files" / row["shown.path"]))
    assert (picture == 7).all()


def test_wandb_that_cannot_be_used(training, tmp_path, monkeypatch, caplog):
    """Without the package, which needs no network to be missing."""
    caplog.set_level(logging.WARNING, "balanced_d2")
    monkeypatch.setattr("balanced_d2.config.checks.check_package", lambda *names: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    training(tmp_path / "output", [1.0, 2.0], "WANDB.ENABLED", "True")
    assert caplog.text.count("Weights & Biases: ") == 1
    assert caplog.text.count("training goes on without it") == 1
    assert (tmp_path / "output" / "model_final.pth").exists()
