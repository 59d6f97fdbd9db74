"""Doing something when a module of another package has been imported, and not before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Waiting(MetaPathFinder):
    """A finder that finds nothing of its own: it waits for one module."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run, then = loader.exec_module, self.then

        def exec_module(module: ModuleType) -> None:
            run(module)
            then()

        loader.exec_module = exec_module
        return spec


def when_imported(module: str, then: Callable[[], None]) -> None:
    """Call `then` once `module` has been imported: now, or whenever that happens.

    Args:
        module: the full name of a module in a file.
        then: must not need modules that may be half imported at that moment.
    """
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(module, then))


__all__ = ["when_imported"]
