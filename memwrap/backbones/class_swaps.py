"""Dynamic subclasses: a module gets a subclass of its own class for as long as it is needed.

No module is replaced, so parameter names, PEFT targets, device maps and output recording stay as
they are. Nothing of a call is kept on a module: several may run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

# Held while modules or their model change in kind.
LOCK = RLock()
_USES: WeakKeyDictionary[nn.Module, dict[str | None, int]] = WeakKeyDictionary()


def subclass(parent: type[nn.Module], kind: str, **members: Any) -> type[nn.Module]:
    """Make a subclass that `lend` can give to a module.

    Args:
        parent: the module's class.
        kind: says what it is for; a module has at most one subclass of a kind.
        members: of the subclass.
    """
    marks = {"_memwrap_parent": parent, "_memwrap_kind": kind, "__doc__": parent.__doc__}
    members = {"__reduce_ex__": _as_its_own_class, **members}
    return type(f"Memory{parent.__name__}", (parent,), {**members, **marks})


def _as_its_own_class(module: nn.Module, protocol: Any) -> Any:
    """Copy or pickle a module as one of the class it had; the model that holds it lends anew."""
    original = type(module)
    while "_memwrap_parent" in vars(original):
        original = vars(original)["_memwrap_parent"]
    made: Any = original.__reduce_ex__(module, protocol)
    return (_new, (original,), *made[2:])


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def is_lent(module: nn.Module, kind: str) -> bool:
    """Tell whether a module has a subclass of a kind."""
    return any(vars(base).get("_memwrap_kind") == kind for base in type(module).__mro__)


def lend(module: nn.Module, kind: str, make: Callable[[Any], type[nn.Module]]) -> None:
    """Give a module the subclass that `make` makes of its class, unless it has one of the kind."""
    with LOCK:
        uses = _USES.setdefault(module, {})
        held = is_lent(module, kind)
        uses[kind] = 1 + (uses.get(kind, 1) if held else 0)
        if not held:
            _swap(module, make(type(module)))


def give_back(module: nn.Module, kind: str) -> None:
    """End one use of a module's subclass of a kind; with the last, it gets its class
    back."""
    with LOCK:
        if not is_lent(module, kind):
            return
        uses = _USES.setdefault(module, {})
        uses[kind] = uses.get(kind, 1) - 1  # a copied module has no count
        while uses.get(vars(type(module)).get("_memwrap_kind"), 1) < 1:
            _swap(module, type(module)._memwrap_parent)  # type: ignore[attr-defined]


def _swap(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, also where accelerate's hooks stand before its forward."""
    module.__class__ = kind
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(kind.forward, module)
