"""Names of the memories: filled where each memory is defined, listed nowhere else."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import TypeVar

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Memory

_MEMORIES: dict[str, tuple[type[MemoryConfig], type[Memory]]] = {}
MemoryClass = TypeVar("MemoryClass", bound=type[Memory])


def register(config: type[MemoryConfig]) -> Callable[[MemoryClass], MemoryClass]:
    """Class decorator: make a memory known under the `name` of its config class.

    Raises:
        ValueError: if another memory has the name already.
    """

    def decorate(memory: MemoryClass) -> MemoryClass:
        known = _MEMORIES.get(config.name)
        if known and known[0].__qualname__ != config.__qualname__:
            raise ValueError(f"The memory name {config.name!r} is taken by {known[0].__name__}.")
        _MEMORIES[config.name] = (config, memory)
        return memory

    return decorate


def _load_all() -> None:
    import memwrap.memories as room

    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"memwrap.memories.{module.name}")


def available() -> list[str]:
    """The names of all memories, sorted."""
    _load_all()
    return sorted(_MEMORIES)


def _entry(name: str) -> tuple[type[MemoryConfig], type[Memory]]:
    names = available()
    if name not in _MEMORIES:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown memory {name!r}; available: {', '.join(names)}.{hint}")
    return _MEMORIES[name]


def config_class(name: str) -> type[MemoryConfig]:
    """The config class of a memory, for example `ARMTConfig` for `"armt"`.

    Raises:
        ValueError: for an unknown name; suggests the nearest.
    """
    return _entry(name)[0]


def memory_class(name: str) -> type[Memory]:
    """The module class of a memory; errors as `config_class`."""
    return _entry(name)[1]
