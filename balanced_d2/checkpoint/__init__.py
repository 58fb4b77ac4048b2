"""Checkpoints: crash-safe writing, reading without running code, and those of MMDetection."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.checkpoint.checkpointer import (
    BalancedCheckpointer,
    check_space,
    load_weights,
    start_from,
)

__all__ = ["BalancedCheckpointer", "check_space", "load_weights", "start_from"]
