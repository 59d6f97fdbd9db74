"""Adapters inside a backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from memwrap.backbones.class_swaps import give_back, lend, subclass

KIND = "adapter"
# Identities of the layers that are switched off in this context.
_off: ContextVar[frozenset[int]] = ContextVar("memwrap_adapters_off", default=frozenset())


@cache
def _switchable(parent: type[BaseTunerLayer]) -> type[torch.nn.Module]:
    def disable_adapters(self: Any) -> bool:
        return id(self) in _off.get() or super(made, self).disable_adapters

    kind: Any = parent
    made = subclass(kind, KIND, disable_adapters=property(disable_adapters))
    return made


@contextmanager
def lora_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Run the block with the adapters of the backbone switched off. Other threads, and what is
    trained, do not notice."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        lend(layer, KIND, _switchable)
    token = _off.set(_off.get() | {id(layer) for layer in layers})
    try:
        yield
    finally:
        _off.reset(token)
        for layer in layers:
            give_back(layer, KIND)


@contextmanager
def lora_enabled(module: torch.nn.Module) -> Iterator[None]:
    """Run the block with the adapters inside a module switched on again, in a block of
    `lora_disabled`."""
    inside = {id(m) for m in module.modules() if isinstance(m, BaseTunerLayer)}
    token = _off.set(_off.get() - inside)
    try:
        yield
    finally:
        _off.reset(token)
