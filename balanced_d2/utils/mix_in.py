"""Mixins: their order in classes, and for one module alone."""

import functools
from typing import Any

from torch import nn


def check_order(cls: type, mixin: type, base: type) -> None:
    """Raise ``TypeError`` if a class has a mixin after the class that it changes, or one derived
    from that, whose methods are then called in the place of the mixin's."""
    order = cls.__mro__
    if base in order and order.index(base) < order.index(mixin):
        raise TypeError(
            f"{cls.__name__} would ignore {mixin.__name__}: in the list of its base classes, it "
            f"has to come before those derived from {base.__name__}"
        )


def mix_in(mixin: type, module: nn.Module) -> None:
    """Let the methods of ``mixin`` come before those of a module's class, for this module alone."""
    cls: Any = type(module)
    module.__class__ = _mixed(mixin, cls)


@functools.cache
def _mixed(mixin: Any, cls: Any) -> type:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
