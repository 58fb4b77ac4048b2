"""MLflow and Weights & Biases, both without a network."""

import logging
import os
import sys

import pytest

from balanced_d2 import load_config
from balanced_d2.config.checks import check_config
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


@pytest.mark.slow
def test_wandb(training, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        training(tmp_path / "output", [1.0, 2.0], "WANDB.ENABLED", "True")
        assert wandb.run.settings.mode == "offline" and wandb.run.project == "balanced_d2"
        assert wandb.run.config["SOLVER"]["BASE_LR"] == 0.001
        wandb.finish()
    finally:
        wandb.finish()
    (log,) = (tmp_path / "output" / "wandb").glob("offline-run-*/*.wandb")
    assert os.path.getsize(log) > 0
