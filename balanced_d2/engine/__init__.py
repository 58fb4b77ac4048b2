"""Training, evaluation and detection from the command line."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.engine.defaults import (
    add_model_arguments,
    argument_parser,
    config_from,
    setup,
)
from balanced_d2.engine.dry_run import dry_run
from balanced_d2.engine.launch import run
from balanced_d2.engine.lazy import trainer_for
from balanced_d2.engine.predictor import build_predictor
from balanced_d2.engine.start import prepare_datasets
from balanced_d2.engine.trainer import BalancedTrainer

__all__ = [
    "BalancedTrainer",
    "add_model_arguments",
    "argument_parser",
    "build_predictor",
    "config_from",
    "dry_run",
    "prepare_datasets",
    "run",
    "setup",
    "trainer_for",
]
