"""The feed-forward block of a decoder layer, found without naming a family, and its input."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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
def noting_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module is given inside the block. Nothing of it stays behind."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
