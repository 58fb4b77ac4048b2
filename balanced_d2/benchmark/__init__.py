"""What is measured: this project against plain Detectron2 and straightforward code."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler says when it starts and stops

# First, so that importing Detectron2 is quiet.
import balanced_d2.utils.requirements  # noqa: F401

# isort: split
from balanced_d2.benchmark.bench import Bench
from balanced_d2.benchmark.classes import measure_classes
from balanced_d2.benchmark.exported import measure_export
from balanced_d2.benchmark.models import measure_fast, measure_whole
from balanced_d2.benchmark.operators import measure_operators
from balanced_d2.benchmark.parts import measure_growth, measure_parts

PARTS = {
    "whole": measure_whole,
    "fast": measure_fast,
    "parts": measure_parts,
    "classes": measure_classes,
    "growth": measure_growth,
    "operators": measure_operators,
    "export": measure_export,
}
"""Functions of a :class:`Bench` and a scale of all images, in (0, 1]."""

__all__ = ["PARTS", "Bench", *(measure.__name__ for measure in PARTS.values())]
