"""The feed-forward block of a decoder layer, found without naming a family, and its input."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor, nn

from memwrap.backbones.class_swaps import lend, subclass

KIND = "feed_forward"
# No keyword of a run reaches the block; a nested run has another list, or none.
_inputs: ContextVar[list[Tensor] | None] = ContextVar("memwrap_feed_forward", default=None)


def feed_forward(layer: nn.Module, mixers: Collection[nn.Module]) -> nn.Module:
    """Find the first part of a decoder layer that holds matrices and none of its `mixers`
    (attention, a recurrent module).

    Raises:
        ValueError: if there is none.
    """
    for child in layer.children():
        inside = any(module in mixers for module in child.modules())
        if not inside and any(parameter.dim() >= 2 for parameter in child.parameters()):
            return child
    raise ValueError(
        f"{type(layer).__name__} has no feed-forward block that could be found; use "
        "key='hidden' (the last hidden states)."
    )


@contextmanager
def inputs_noted_in(inputs: list[Tensor] | None) -> Iterator[None]:
    """Append what an attached block is given inside this one to `inputs`; None: nowhere."""
    token = _inputs.set(inputs)
    try:
        yield
    finally:
        _inputs.reset(token)


@cache
def _noting(parent: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = _inputs.get()
        if inputs is not None:
            inputs.append(args[0] if args else next(iter(kwargs.values())))
        return parent.forward(self, *args, **kwargs)

    return subclass(parent, KIND, forward=forward)


def attach(block: nn.Module) -> None:
    """Let a block note what it is given, where a run asks for it."""
    lend(block, KIND, _noting)
