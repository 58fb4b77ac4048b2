"""Datasets. Importing this registers the built-in ones."""

import balanced_d2.utils.requirements  # noqa: F401

# isort: split
import balanced_d2.data.datasets.builtin  # noqa: F401  # registration
from balanced_d2.data.checks.for_model import check_datasets, check_registered
from balanced_d2.data.datasets.coco import load_coco, register_coco
from balanced_d2.data.datasets.register import add_register_argument, register_from

__all__ = [
    "add_register_argument",
    "check_datasets",
    "check_registered",
    "load_coco",
    "register_coco",
    "register_from",
]
