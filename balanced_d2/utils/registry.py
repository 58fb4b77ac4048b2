"""Registries from which config keys choose by name: fvcore's, with names that can be given."""

import functools
import inspect
from typing import Any, Collection, List

from fvcore.common.registry import Registry as _Registry

from balanced_d2.utils.errors import UserError


class Registry(_Registry):
    """What a config key can choose from, in this project and in packages of its users.

    ::

        @NEGATIVE_SAMPLERS.register()
        def hardest_first(ious, num_samples):
            return ious.topk(min(num_samples, len(ious))).indices

    makes ``MODEL.ROI_HEADS.NEGATIVE_SAMPLER: "hardest_first"`` known wherever the file that holds
    it has been imported.

    Args:
        name: of the registry.
        key: the config key, for messages.
        others: names that the key knows besides, which are not made here.
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
            AssertionError: if the name is taken.
        """
        if obj is None:
            return functools.partial(self.register, name=name)
        self._do_register(name or obj.__name__, obj)
        return obj

    def names(self) -> List[str]:
        """The names of all entries, in the order of their registration."""
        return [name for name, _ in self]

    def check(self, name: str) -> None:
        """Raise :class:`UserError` if the key does not know ``name``, with the names it knows."""
        if name not in self and name not in self.others:
            known = ", ".join([*self.others, *self.names()])
            raise UserError(f"{self.key}: there is no {name!r}; choose one of: {known}")

    def build(self, name: str, node: Any, **given: Any) -> Any:
        """What a config asks for, ready for use.

        A function is taken as it is. A class is made from the config: its
        ``from_config(node, **given)`` returns the arguments.

        Args:
            node: the part of the config that holds the parameters.
            given: what the one who asks knows besides.

        Raises:
            UserError: if there is no entry of that name.
        """
        self.check(name)
        entry = self.get(name)
        if inspect.isclass(entry) and hasattr(entry, "from_config"):
            return entry(**entry.from_config(node, **given))
        return entry
