"""Evaluators."""

from balanced_d2.evaluation.build import build_evaluator

__all__ = ["build_evaluator"]
