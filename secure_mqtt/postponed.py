"""An import that waits until something is used."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


class Postponed(ModuleType):
    """Stands for a module, and imports it when it is asked for an attribute."""

    def __getattr__(self, attribute: str) -> Any:
        """Return the module's attribute."""
        self.step_aside()
        return getattr(importlib.import_module(self.__name__), attribute)

    def step_aside(self) -> None:
        """Let whoever imports the module from now on get the real one."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


@contextlib.contextmanager
def postponed(name: str) -> Iterator[None]:
    """Let whoever imports a module in this block get one that stands for it.

    What was loaded already stays. importlib.util.LazyLoader would not do: the import statement
    itself asks a module for an attribute, and so loads it.

    :param name: of package and module; who uses it does so by that name, as package.module
    """
    if name in sys.modules:
        yield
        return
    package, _, module = name.rpartition(".")
    stand_in = sys.modules[name] = Postponed(name)
    setattr(importlib.import_module(package), module, stand_in)  # as an import does
    try:
        yield
    finally:
        stand_in.step_aside()
