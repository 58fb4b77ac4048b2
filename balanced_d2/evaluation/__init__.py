"""Evaluators."""

from balanced_d2.evaluation.build import build_evaluator
from balanced_d2.evaluation.validation_images import ValidationImages

__all__ = ["ValidationImages", "build_evaluator"]
