"""The first stage of a conversion: layer by layer the attention with a memory learns to give what
the backbone's own attention gives of the same input (LoLCATs, Zhang et al. 2024; HALO, arXiv
2601.22156).

The backbone runs as it was, without adapters and without a graph. Beside each layer's attention the
same module runs once more, with its adapters and the memory, on the input that the backbone gave
it; what the two give, behind the output projection, is compared. Every segment is a text of its
own: the backbone's attention sees nothing in front of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memwrap.backbones import LayerAttention
from memwrap.backbones.adapters import lora_disabled, lora_enabled
from memwrap.backbones.contexts import reaching
from memwrap.backbones.layer_attention import AttentionStep

_on: ContextVar[bool] = ContextVar("memwrap_mixer_matching", default=False)
_kept: ContextVar[frozenset[int]] = ContextVar("memwrap_softmax_layers", default=frozenset())


def matching_mixers() -> bool:
    """Tell whether mixers are compared instead of a text predicted."""
    return _on.get()


@contextmanager
def mixers_matched(wanted: bool = True) -> Iterator[None]:
    """Compare mixers inside the block, in this thread, if `wanted`."""
    token = _on.set(wanted)
    try:
        yield
    finally:
        _on.reset(token)


def keeps_softmax(layer: int) -> bool:
    """Tell whether a layer's attention meets no memory (`softmax_in`)."""
    return layer in _kept.get()


@contextmanager
def softmax_in(layers: Collection[int], modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Leave layers as they were inside the block, in this thread: their attention sees its segment
    with its own softmax, and their adapters are off.

    Args:
        layers: numbers of decoder layers.
        modules: all decoder layers.
    """
    token = _kept.set(frozenset(layers))
    try:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(lora_disabled(modules[layer]))
            yield
    finally:
        _kept.reset(token)


@contextmanager
def as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Run a backbone as the teacher: without its adapters, and without a graph."""
    with torch.no_grad(), lora_disabled(model):
        yield


@dataclass
class Student:
    """A context in which a layer's attention meets its memory, beside the run it is part of.

    Attributes:
        step: what the attention of all layers shares.
        attend: gives the attention's output.
    """

    step: AttentionStep
    attend: Callable[[LayerAttention], Tensor]

    def attention_step(self, device: torch.device) -> AttentionStep:
        return self.step

    def attention(self, attention: LayerAttention) -> Tensor:
        return self.attend(attention)


def unexplained(
    attention: LayerAttention, attend: Callable[[LayerAttention], Tensor], wanted: Tensor
) -> Tensor:
    """Compare a layer's attention with a memory to the attention's own output.

    Args:
        attention: the layer's, in the backbone's run.
        attend: reads the memory.
        wanted: `(B, T, D)` what the module gave.

    Returns:
        `(B,)` squared error of a row's tokens over their own squares: 0 where nothing is missing.
    """
    call = attention.call
    keywords = {
        name: None if isinstance(value, Cache)
        else copy.copy(value) if isinstance(value, MutableMapping) else value
        for name, value in call.keywords.items()
    }  # fmt: skip
    inputs = call.inputs.detach()
    with lora_enabled(attention.module), reaching(Student(attention.step, attend)):
        out = attention.module(inputs, **keywords)
    given = out[0] if isinstance(out, tuple) else out
    wide = torch.promote_types(given.dtype, torch.float32)
    valid, target = attention.query_valid[..., None], wanted.detach().to(wide)
    error = (given.to(wide) - target).square().masked_fill(~valid, 0.0).sum((1, 2))
    size = target.square().masked_fill(~valid, 0.0).sum((1, 2))
    return error / size.clamp_min(torch.finfo(wide).tiny)
