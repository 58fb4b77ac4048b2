"""Checkpoints: crash-safe writing, reading without running code, and those of MMDetection."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.checkpoint.checkpointer import (
    AVERAGED,
    BalancedCheckpointer,
    Contents,
    check_space,
    load_weights,
    read_contents,
    start_from,
    trainer_state,
    training_in,
)

__all__ = [
    "AVERAGED",
    "BalancedCheckpointer",
    "Contents",
    "check_space",
    "load_weights",
    "read_contents",
    "start_from",
    "trainer_state",
    "training_in",
]
