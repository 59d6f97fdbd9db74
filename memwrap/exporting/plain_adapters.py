"""Stands in for `memwrap.model.adapter_switches` and `memwrap.backbones.adapters` in exported code,
whose backbone has no adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def adapter_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over nothing: no module holds adapters."""
    yield from ()


def adapter_keys(backbone: Any, idle: bool = False) -> set[str]:
    """Name no tensors."""
    return set()


@contextmanager
def lora_disabled(model: Any) -> Iterator[None]:
    """Run the block; there is nothing to switch off."""
    yield


# What is off may be on inside: nothing here either.
lora_enabled = lora_disabled


def adapters_in_use(model: Any) -> list[str]:
    """List no adapters."""
    return []
