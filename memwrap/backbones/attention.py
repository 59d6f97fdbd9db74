"""The attention place: what one layer's attention offers a memory, without touching projections.

An attention function registered under memwrap's own name receives queries, keys and values
after the layer's projections, norms and rotation, whatever the family, and hands them to the
memory together with the model's own attention as a function. The attention module's dynamic
subclass only notes what it was given.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from memwrap.backbones.layer_attention import PREFIX, Call, SeenAttention, implementation
from memwrap.backbones.layers import swap_class


class AttentionReader(Protocol):
    """What the attention function finds in the keyword `memory_context`."""

    def attention(self, seen: SeenAttention) -> Tensor: ...


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for parent in type(module).__mro__:
        found = getattr(sys.modules.get(parent.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{type(module).__name__} offers no eager attention; use sdpa.")


def _attention_function(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        memory_context: AttentionReader | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling

        def through(function: Callable[..., Any]) -> Call:
            return lambda q, k, v, mask: function(
                module, q, k, v, mask, dropout=dropout, scaling=scale, **kwargs
            )

        own = through(sdpa_attention_forward if name == "sdpa" else _eager_of(module))
        if memory_context is None:
            return own(query, key, value, attention_mask)
        noted, module._memwrap_noted = module._memwrap_noted, None  # type: ignore[assignment]
        hidden, keywords = noted  # type: ignore[misc]
        seen = SeenAttention(
            module, query, key, value, attention_mask, scale,
            kwargs.get("sliding_window"), own,
            through(_eager_of(module)), hidden, keywords, kwargs.get("softcap"),
        )  # fmt: skip
        out = memory_context.attention(seen)
        module._memwrap_added = seen.added  # type: ignore[assignment]
        return out, None

    return forward


for _name, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(PREFIX + _name, _attention_function(_name))
    AttentionMaskInterface.register(PREFIX + _name, _mask)


@cache
def _memory_attention(parent: type[nn.Module]) -> type[nn.Module]:
    names = [p for p in inspect.signature(parent.forward).parameters if p != "self"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        if kwargs.get("memory_context") is not None:
            rest = {k: v for k, v in kwargs.items() if k not in (names[0], "memory_context")}
            self._memwrap_noted = (kwargs[names[0]], rest)
        out = parent.forward(self, **kwargs)
        added = vars(self).pop("_memwrap_added", None)
        if added is None:
            return out
        if isinstance(out, tuple):
            return (out[0] + added.to(out[0].dtype), *out[1:])
        return out + added.to(out.dtype)

    members = {"forward": forward, "_memwrap_parent": parent, "__doc__": parent.__doc__}
    return type(f"Memory{parent.__name__}", (parent,), members)


def attention_modules(layers: nn.ModuleList, without: Collection[int]) -> dict[int, nn.Module]:
    """The attention module of every decoder layer but those `without`.

    Raises:
        ValueError: if a layer has none, or several.
    """
    found = {}
    for index, layer in enumerate(layers):
        if index in without:
            continue
        own = [m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
        if len(own) != 1 or own[0].layer_idx != index:
            raise ValueError(
                f"Layer {index} ({type(layer).__name__}) has {len(own)} attention modules with a "
                "layer number; memories at the attention place need exactly one a layer."
            )
        found[index] = own[0]
    return found


def attach(model: Any, modules: Iterable[nn.Module]) -> None:
    """Let attention modules meet a memory."""
    for module in modules:
        if not hasattr(type(module), "_memwrap_parent"):
            swap_class(module, _memory_attention(type(module)))  # type: ignore[arg-type]
    name = implementation(model.config.get_text_config(decoder=True))
    model.set_attn_implementation(PREFIX + name)


def detach(model: Any, modules: Iterable[nn.Module]) -> None:
    """Give attention modules their own class and function back."""
    for module in modules:
        parent = getattr(type(module), "_memwrap_parent", None)
        if parent is not None:
            swap_class(module, parent)
            vars(module).pop("_memwrap_noted", None)
    model.set_attn_implementation(implementation(model.config.get_text_config(decoder=True)))
