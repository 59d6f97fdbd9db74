"""Names of the memories. memwrap's own are found in this folder, those of other packages by their
entry points; no list is kept anywhere.

A package declares its memory in its pyproject.toml, and is imported when that memory is asked for:

    [project.entry-points."memwrap.memories"]
    ema = "ema_memory:EMAMemory"
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TypeVar

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Memory

GROUP = "memwrap.memories"

_MEMORIES: dict[str, tuple[type[MemoryConfig], type[Memory]]] = {}
_RESOLVED: set[str] = set()  # names whose entry points, if any, were loaded
MemoryClass = TypeVar("MemoryClass", bound=type[Memory])


def register(config: type[MemoryConfig]) -> Callable[[MemoryClass], MemoryClass]:
    """Make a memory known under the `name` of its config class (a class decorator).

    The same class may come again (a cell of a notebook, `importlib.reload`) and replaces itself.

    Raises:
        ValueError: for a name that is no identifier, or that another memory has already.
    """
    name = config.name
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"{_path(config)}.name is {name!r}; it must be an identifier, such as 'ema'."
        )

    def decorate(memory: MemoryClass) -> MemoryClass:
        new = (config, memory)
        known = _MEMORIES.get(name, new)
        if [_path(c) for c in known] != [_path(c) for c in new]:
            raise ValueError(
                f"Two memories are named {name!r}: {' with '.join(map(_path, reversed(known)))}, "
                f"and {' with '.join(map(_path, reversed(new)))}. Rename or uninstall one."
            )
        _MEMORIES[name] = new
        return memory

    return decorate


def available() -> list[str]:
    """List the names of all memories that are installed or registered, sorted.

    Other packages are not imported for it, so a name may turn out to be broken when it is used.
    Examples:
        >>> import memwrap
        >>> "armt" in memwrap.available()
        True

    """
    _import_own()
    return sorted({*_MEMORIES, *installed().names})


def installed() -> EntryPoints:
    """Find the entry points of other packages' memories."""
    return entry_points(group=GROUP)


def config_class(name: str) -> type[MemoryConfig]:
    """Find the config class of a memory, for example `ARMTConfig` for `"armt"`.

    Examples:
        >>> import memwrap
        >>> memwrap.config_class("armt").__name__
        'ARMTConfig'

    Raises:
        ValueError: for an unknown name (suggests the nearest), and for a memory of another
            package that cannot be imported.
    """
    return _resolve(name)[0]


def memory_class(name: str) -> type[Memory]:
    """Find the module class of a memory; errors as `config_class`."""
    return _resolve(name)[1]


def _resolve(name: str) -> tuple[type[MemoryConfig], type[Memory]]:
    _import_own()
    if name not in _MEMORIES or name not in _RESOLVED:
        for point in installed().select(name=name):
            _load(point)
    if name not in _MEMORIES:
        names = available()
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Is the package that brings it installed?"
        raise ValueError(f"Unknown memory {name!r}; memwrap.available() names {len(names)}. {hint}")
    _RESOLVED.add(name)
    return _MEMORIES[name]


@cache  # looking into the folder takes as long as building a config
def _import_own() -> None:
    import memwrap.memories as room

    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"memwrap.memories.{module.name}")


def _load(point: EntryPoint) -> None:
    """Import the package of an entry point, which registers its memory.

    Only the metadata of installed packages says what is imported, never a file that is read.
    """
    origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    try:
        memory = point.load()
    except Exception as error:  # whatever a foreign package raises
        raise ValueError(
            f"The memory {point.name!r} of {origin} cannot be imported ({point.value}): "
            f"{type(error).__name__}: {error}"
        ) from error
    if memory is not _MEMORIES.get(point.name, (None, None))[1]:
        raise ValueError(
            f"{origin} declares the memory {point.name!r} as {point.value}, which is not registered"
            f" so: it must be a Memory class with @register(Config) and Config.name {point.name!r}."
        )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
