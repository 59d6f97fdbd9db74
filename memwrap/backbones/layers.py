"""The layer place: a decoder layer that reads before and writes after its own forward.

The instance gets a dynamic subclass of its class; no module is replaced, so parameter names,
PEFT targets, device maps and output recording stay as they are.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn


class LayerReader(Protocol):
    """The protocol of the keyword `memory_context`, as decoder layers see it."""

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor: ...

    def after_layer(self, layer: int, hidden: Tensor) -> None: ...


class Meeting(Protocol):
    """The protocol of the keyword `memory_recurrence`."""

    def meet(self, layer: nn.Module) -> None: ...


def swap_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give one instance another class, also where accelerate's hooks stand before its forward."""
    module.__class__ = kind
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(kind.forward, module)


@cache
def _memory_layer(parent: type[nn.Module], index: int) -> type[nn.Module]:
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        memory_context: LayerReader | None = None,
        memory_recurrence: Meeting | None = None,
        **kwargs: Any,
    ) -> Any:
        if memory_recurrence is not None:
            memory_recurrence.meet(self)
        if memory_context is None:
            return parent.forward(self, hidden_states, *args, **kwargs)
        hidden_states = memory_context.before_layer(index, hidden_states)
        out = parent.forward(self, hidden_states, *args, memory_context=memory_context, **kwargs)
        memory_context.after_layer(index, out[0] if isinstance(out, tuple) else out)
        return out

    members = {"forward": forward, "_memwrap_parent": parent, "__doc__": parent.__doc__}
    return type(f"Memory{parent.__name__}", (parent,), members)


def attach(layers: nn.ModuleList) -> None:
    """Let every layer read and write; a layer that does already is left alone."""
    for index, layer in enumerate(layers):
        if not hasattr(type(layer), "_memwrap_parent"):
            swap_class(layer, _memory_layer(type(layer), index))  # type: ignore[arg-type]


def detach(layers: nn.ModuleList) -> None:
    """Give every layer its own class back."""
    for layer in layers:
        parent = getattr(type(layer), "_memwrap_parent", None)
        if parent is not None:
            swap_class(layer, parent)
