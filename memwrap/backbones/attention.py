"""The attention place: what one layer's attention offers a memory, without touching projections.

An attention function registered under memwrap's own name receives queries, keys and values
after the layer's projections, norms and rotation, whatever the family, and hands them to the
memory together with the model's own attention as a function. The attention module's dynamic
subclass notes what it was called with on the way there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from memwrap.backbones.class_swaps import LOCK, give_back, is_lent, lend, subclass
from memwrap.backbones.contexts import reached
from memwrap.backbones.layer_attention import (
    PREFIX,
    AttentionCall,
    AttentionFunction,
    LayerAttention,
    implementation,
)
from memwrap.ops import narrowed

KIND = "attention"
_ADDED = ("position_bias", "softcap", "s_aux")  # what a model may add to a plain softmax
# No keyword of an attention module needs to reach its attention function.
_calls: ContextVar[AttentionCall | None] = ContextVar("memwrap_attention", default=None)


@cache
def _eager_of(kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for parent in kind.__mro__:
        module = sys.modules.get(parent.__module__)
        if hasattr(module, "eager_attention_forward"):
            return module.eager_attention_forward  # type: ignore[union-attr]
    raise ValueError(f"{kind.__name__} offers no eager attention; use sdpa.")


def _attention_function(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        kind: Any = type(module)

        def through(function: Callable[..., Any]) -> AttentionFunction:
            return lambda q, k, v, mask: function(
                module, q, k, v, mask, dropout=dropout, scaling=scale, **kwargs
            )

        function = through(sdpa_attention_forward if name == "sdpa" else _eager_of(kind))
        call = _calls.get()
        if call is None or call.module is not module:
            return function(query, key, value, attention_mask)
        context = call.context
        attention = LayerAttention(
            module,
            call,
            context.attention_step(key.device),
            rotated_query=query,
            rotated_key=key,
            value=value,
            mask=attention_mask,
            rotated_scaling=scale,
            function=function,
            eager=through(_eager_of(kind)),
            plain=name == "sdpa" and not dropout and all(kwargs.get(n) is None for n in _ADDED),
            window=kwargs.get("sliding_window"),
            # Releases before 5.24 let sdpa drop a cap without a word; later ones refuse it.
            softcap=None if name == "sdpa" else kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        )
        return context.attention(attention).contiguous(), None

    return forward


for _name, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(PREFIX + _name, _attention_function(_name))
    AttentionMaskInterface.register(PREFIX + _name, _mask)


@cache
def _memory_attention(parent: type[nn.Module]) -> type[nn.Module]:
    names = [p for p in inspect.signature(parent.forward).parameters if p != "self"]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = reached()
        if context is None:
            return parent.forward(self, *args, **kwargs)
        kwargs.update(zip(names, args, strict=False))
        rest = {name: value for name, value in kwargs.items() if name != names[0]}
        call = AttentionCall(self, context, kwargs[names[0]], rest)
        token = _calls.set(call)
        try:
            out = parent.forward(self, **kwargs)
        finally:
            _calls.reset(token)
        if call.after is not None:
            call.after(out[0] if isinstance(out, tuple) else out)
        if call.added is None:
            return out
        if isinstance(out, tuple):
            return (out[0] + narrowed(call.added, out[0].dtype), *out[1:])
        return out + narrowed(call.added, out.dtype)

    return subclass(parent, KIND, forward=forward)


def attention_modules(layers: nn.ModuleList, without: Collection[int]) -> dict[int, nn.Module]:
    """Find the attention module of every decoder layer but those `without`.

    Raises:
        ValueError: if a layer has none, or several.
    """
    modules = {}
    for index, layer in enumerate(layers):
        if index in without:
            continue
        inside = [m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
        if len(inside) != 1 or inside[0].layer_idx != index:
            raise ValueError(
                f"Layer {index} ({type(layer).__name__}) has {len(inside)} attention modules with "
                "a layer number; memories at the attention place need exactly one a layer."
            )
        modules[index] = inside[0]
    return modules


def attach(model: Any, modules: Collection[nn.Module]) -> None:
    """Let attention modules meet a memory."""
    with LOCK:
        for module in modules:
            lend(module, KIND, _memory_attention)
        _choose(model, PREFIX)


def _choose(model: Any, prefix: str = "") -> None:
    """Let the part of a model that reads text attend by its own function, or memwrap's before it:
    towers that see or hear keep theirs, and may know no other."""
    config = model.config.get_text_config(decoder=True)
    models = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config)
    next(models, model).set_attn_implementation(prefix + implementation(config))


def detach(model: Any, modules: Collection[nn.Module]) -> None:
    """Give attention modules their own class and function back, unless others need them."""
    with LOCK:
        for module in modules:
            give_back(module, KIND)
        if not any(is_lent(module, KIND) for module in modules):
            _choose(model)
