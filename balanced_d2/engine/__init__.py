"""Training and evaluation from the command line."""

from balanced_d2.engine.run import run
from balanced_d2.engine.setup import argument_parser, setup
from balanced_d2.engine.trainer import BalancedTrainer

__all__ = ["BalancedTrainer", "argument_parser", "run", "setup"]
