"""Checkpoints of the trainer, across versions of Detectron2."""

import logging

import pytest
import torch
from detectron2.engine.train_loop import SimpleTrainer, TrainerBase

from balanced_d2.engine import BalancedTrainer


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
    trainer.start_iter = 0
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
    """As Detectron2 0.6's own trainer writes it: resumed with a warning."""
    state = trainer.state_dict()
    del state["_trainer"]
    trainer.iter = 0
    with caplog.at_level(logging.WARNING, "balanced_d2"):
        trainer.load_state_dict(state)
    assert trainer.iter == 41 and trainer.start_iter == 42
    assert "no optimizer state" in caplog.text
