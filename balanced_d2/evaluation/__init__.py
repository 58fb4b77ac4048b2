"""Evaluators."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.evaluation.evaluators import build_evaluator

__all__ = ["build_evaluator"]
