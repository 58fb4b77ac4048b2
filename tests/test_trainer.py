"""Checkpoints of the trainer, across versions of Detectron2."""

import copy
import logging
import shutil

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine.train_loop import SimpleTrainer, TrainerBase

from balanced_d2 import load_config
from balanced_d2.data import register_coco
from balanced_d2.engine import BalancedTrainer

from .conftest import ROOT, TINY_CONFIG, TINY_MODEL, logged


@pytest.fixture
def trainer():
    """A trainer around one parameter, after one step with momentum."""
    trainer = BalancedTrainer.__new__(BalancedTrainer)
    TrainerBase.__init__(trainer)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer._trainer = SimpleTrainer(model, torch.utils.data.DataLoader([0]), optimizer)
    model(torch.ones(1)).backward()
    optimizer.step()
    trainer.iter = trainer._trainer.iter = 41
    trainer.start_iter, trainer.max_iter = 0, 100
    return trainer


def momentum(trainer):
    return [s["momentum_buffer"] for s in trainer._trainer.optimizer.state.values()]


def test_optimizer_state_in_mains_format(trainer):
    state = trainer.state_dict()
    assert state["iteration"] == 41
    assert set(state["_trainer"]) >= {"iteration", "optimizer"}
    saved = momentum(trainer)
    trainer._trainer.optimizer.state.clear()
    trainer.load_state_dict(state)
    assert len(saved) == 2 and all(map(torch.equal, momentum(trainer), saved))


def test_checkpoint_without_optimizer_state(trainer, caplog):
    """Resuming from a checkpoint of Detectron2 0.6's own trainer works, with a warning."""
    state = trainer.state_dict()
    del state["_trainer"]
    trainer.iter = 0
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        trainer.load_state_dict(state)
    assert trainer.iter == 41 and trainer.start_iter == 42
    assert "no optimizer state" in caplog.text


@pytest.mark.slow
def test_resume_with_a_scheduler_of_pytorchs_is_exact(tiny_coco, tmp_path, monkeypatch):
    class Trainer(BalancedTrainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    monkeypatch.setattr(DatasetCatalog, "data", copy.copy(DatasetCatalog.data))  # undone afterwards
    register_coco("resumed", str(tiny_coco), str(tiny_coco.parent / "images"))

    def train(folder, resume):
        options = [*TINY_MODEL, "SEED", "3", "OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu"]
        options += ["DATASETS.TRAIN", "('resumed',)", "DATASETS.TEST", "()"]
        options += ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3"]
        trainer = Trainer(load_config(str(ROOT / TINY_CONFIG), options))
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return logged(folder)[-1]["lr"], trainer.cfg.SOLVER.BASE_LR

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    resumed.mkdir()
    rate, first_rate = train(whole, resume=False)
    shutil.copy(whole / "model_0000002.pth", resumed)
    (resumed / "last_checkpoint").write_text("model_0000002.pth")
    assert rate == pytest.approx(first_rate / 4)
    assert train(resumed, resume=True) == (rate, first_rate)
    a, b = (torch.load(folder / "model_final.pth")["model"] for folder in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)
