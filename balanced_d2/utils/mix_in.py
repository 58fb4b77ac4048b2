"""Changing how one module computes, and nothing else of it."""

import functools
from typing import Any

from torch import nn


def mix_in(mixin: type, module: nn.Module) -> None:
    """Let the methods of ``mixin`` come before those of a module's class, for this module alone."""
    cls: Any = type(module)
    module.__class__ = _mixed(mixin, cls)


@functools.cache
def _mixed(mixin: Any, cls: Any) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
