"""Balanced learning (Libra R-CNN) for Detectron2.

The first use of a name of this package, or of its parts ``config``, ``modeling``, ``data`` or
``engine``, imports Detectron2 and registers what they add to it. Without Detectron2,
:mod:`balanced_d2.layers` still works: the method on plain tensors.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from balanced_d2.config import add_balanced_config, load_config
    from balanced_d2.detection import Detector

__version__ = "0.1.0"
__all__ = ["Detector", "add_balanced_config", "load_config"]

_HOMES = {
    "Detector": "balanced_d2.detection",
    "add_balanced_config": "balanced_d2.config",
    "load_config": "balanced_d2.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("balanced_d2.data")  # registers the built-in datasets
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
