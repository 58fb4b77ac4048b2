"""Data sets. Importing registers the built-in ones."""

from balanced_d2.data import builtin  # noqa: F401  # registration
from balanced_d2.data.check import check_datasets, check_registered
from balanced_d2.data.coco import load_coco, register_coco
from balanced_d2.data.register import add_register_argument, register_from

__all__ = [
    "add_register_argument",
    "check_datasets",
    "check_registered",
    "load_coco",
    "register_coco",
    "register_from",
]
