"""Stands in for `memwrap.model.adapter_switches` in exported code, which has none inside its backbone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def adapter_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over nothing: no module holds adapters."""
    yield from ()


def adapter_keys(backbone: Any, idle: bool = False) -> set[str]:
    """Name no tensors."""
    return set()


def adapters_in_use(model: Any) -> list[str]:
    """List no adapters."""
    return []
