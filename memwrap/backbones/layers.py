"""The layer place: a decoder layer that reads before and writes after its own forward."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Protocol

from torch import Tensor, nn

from memwrap.backbones.class_swaps import lend, subclass
from memwrap.backbones.contexts import reached

KIND = "layer"


class LayerReader(Protocol):
    """The protocol of a run's context, as decoder layers see it."""

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor: ...

    def after_layer(self, layer: int, hidden: Tensor) -> None: ...


@cache
def _memory_layer(parent: type[nn.Module], index: int) -> type[nn.Module]:
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        context: LayerReader | None = reached()
        if context is None:
            return parent.forward(self, hidden_states, *args, **kwargs)
        hidden_states = context.before_layer(index, hidden_states)
        out = parent.forward(self, hidden_states, *args, **kwargs)
        context.after_layer(index, out[0] if isinstance(out, tuple) else out)
        return out

    return subclass(parent, KIND, forward=forward)


class LayerProbe:
    """A context that notes the shapes that layers are given."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, ...]] = {}

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        self.shapes[layer] = tuple(hidden.shape)
        return hidden

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        return None

    def attention_step(self, device: Any) -> None:
        return None

    def attention(self, attention: Any) -> Tensor:
        return attention.local()


def attach(layers: nn.ModuleList) -> None:
    """Let every layer read and write."""
    for index, layer in enumerate(layers):
        lend(layer, KIND, partial(_memory_layer, index=index))
