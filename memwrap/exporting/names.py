"""Stands in for `memwrap.memories.registry` in exported code: it has the exported memories."""

from __future__ import annotations

from typing import Any

_MEMORIES: dict[str, tuple[Any, Any]] = {}


def register(config: Any) -> Any:
    """Make a memory known under the `name` of its config class (a class decorator)."""

    def decorate(memory: Any) -> Any:
        _MEMORIES[config.name] = (config, memory)
        return memory

    return decorate


def config_class(name: str) -> Any:
    """Find the config class of a memory.

    Raises:
        ValueError: for a memory that was not exported.
    """
    return _entry(name)[0]


def memory_class(name: str) -> Any:
    """Find the module class of a memory; errors as `config_class`."""
    return _entry(name)[1]


def _entry(name: str) -> tuple[Any, Any]:
    if name not in _MEMORIES:
        known = ", ".join(_MEMORIES)
        raise ValueError(f"This checkpoint's code has no memory {name!r}; it has: {known}.")
    return _MEMORIES[name]
