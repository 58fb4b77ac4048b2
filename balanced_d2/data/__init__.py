"""Data sets. Importing registers the built-in ones."""

from balanced_d2.data import builtin  # noqa: F401  # registration
from balanced_d2.data.coco import load_coco, register_coco

__all__ = ["load_coco", "register_coco"]
