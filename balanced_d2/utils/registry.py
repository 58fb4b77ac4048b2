"""Registries from which config keys choose by name: fvcore's, with optional names."""

import functools
import inspect
from typing import Any, Collection, List

from fvcore.common.registry import Registry as _Registry

from balanced_d2.utils.errors import UserError


def name_of(entry: Any) -> str:
    """What messages call a function or an object: its name, or that of its class."""
    return getattr(entry, "__name__", type(entry).__name__)


class Registry(_Registry):
    """The entries that a config key can choose from, of this project and of its users.

    ::

        @NEGATIVE_SAMPLERS.register()
        def hardest_first(ious, num_samples):
            return ious.topk(min(num_samples, len(ious))).indices

    makes ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER: "hardest_first"`` valid wherever the file that
    contains it has been imported.

    Args:
        name: name of the registry.
        key: the config key, for messages.
        others: further names that are valid for the key but not built here.
    """

    def __init__(self, name: str, key: str, others: Collection[str] = ()):
        super().__init__(name)
        self.key = key
        self.others = tuple(others)

    def register(self, obj: Any = None, *, name: str = "") -> Any:
        """Register a function or class, as a decorator or by a call.

        Args:
            name: the name in configs, by default that of the function or class.

        Raises:
            AssertionError: if the name is already taken, be it by Detectron2.
        """
        if obj is None:
            return functools.partial(self.register, name=name)
        name = name or obj.__name__
        if name in self.others:  # it would never be built
            raise AssertionError(f"{self.key} {name!r} is Detectron2's own; choose another name")
        self._do_register(name, obj)
        return obj

    def names(self) -> List[str]:
        """The names of all entries, in the order of their registration."""
        return [name for name, _ in self]

    def check(self, name: str) -> None:
        """Raise :class:`UserError`, with the valid names, if ``name`` is not one of them."""
        if name not in self and name not in self.others:
            known = ", ".join([*self.others, *self.names()])
            raise UserError(f"{self.key}: there is no {name!r}; choose one of: {known}")

    def build(self, name: str, node: Any, **given: Any) -> Any:
        """Build the entry that a config names.

        A function is returned unchanged. A class is instantiated with the arguments that its
        ``from_config(node, **given)`` returns, or, if it does not have that, without any.

        Args:
            node: the part of the config that has the parameters.
            given: values that the caller knows, for ``from_config``.

        Raises:
            UserError: if there is no entry with that name.
        """
        self.check(name)
        entry = self.get(name)
        if not inspect.isclass(entry):
            return entry
        return (
            entry(**entry.from_config(node, **given)) if hasattr(entry, "from_config") else entry()
        )
