"""Balanced learning (Libra R-CNN) for Detectron2. Importing this package registers everything.

Without Detectron2, :mod:`balanced_d2.layers` still works: the method on plain tensors.
"""

__version__ = "0.1.0"
__all__ = ["add_balanced_config", "load_config"]

try:
    from balanced_d2.config import add_balanced_config, load_config
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
else:
    from balanced_d2 import data  # noqa: F401  # registers the built-in datasets
