"""Evaluators."""

from balanced_d2.evaluation.evaluators import build_evaluator

__all__ = ["build_evaluator"]
