"""Training, evaluation and detection from the command line."""

from balanced_d2.engine.predictor import build_predictor
from balanced_d2.engine.run import run
from balanced_d2.engine.setup import add_model_arguments, argument_parser, config_from, setup
from balanced_d2.engine.trainer import BalancedTrainer

__all__ = [
    "BalancedTrainer",
    "add_model_arguments",
    "argument_parser",
    "build_predictor",
    "config_from",
    "run",
    "setup",
]
