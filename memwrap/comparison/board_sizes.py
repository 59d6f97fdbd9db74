"""How large a memory may be: its settings that bound it are scaled until a state fits a budget.

Fields that mean the same have the same name in all memories, so that a few names say what bounds a
state. They are scaled together, in the ratio of their defaults; what a state takes is measured at
two sizes on a short text, and lies on a line between and beyond them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import memwrap

SIZES = ("window_size", "memory_size", "compressed_size", "cache_size", "slots")
PROBES = (64, 128)
LEAST = 8
"""The largest of the fields at the two sizes, and the least that makes a memory."""


@dataclass(frozen=True)
class Scale:
    """The bytes of a state as a line over the factor by which a config's sizes are scaled.

    Attributes:
        sizes: fields and their values at the factor 1.
        fixed: bytes at the factor 0.
        slope: bytes that the factor 1 adds.
        most: the largest field is at most this: nothing is gained beyond it.
    """

    sizes: dict[str, int]
    fixed: float
    slope: float
    most: int

    def settings(self, budget: float) -> dict[str, int] | None:
        """Choose the sizes that fill a budget of bytes; None where nothing fits."""
        largest = max(self.sizes.values())
        factor = min((budget - self.fixed) / self.slope, self.most / largest)
        return None if factor * largest < LEAST else scaled(self.sizes, factor)


def scaled(sizes: dict[str, int], factor: float) -> dict[str, int]:
    """Multiply sizes, each at least 1."""
    return {name: max(1, int(value * factor)) for name, value in sizes.items()}


def size_fields(config: Any) -> dict[str, int]:
    """Find the fields of a config that bound its state."""
    values = {name: getattr(config, name, None) for name in SIZES}
    return {name: value for name, value in values.items() if type(value) is int and value > 0}


def scale_of(base: Any, name: str, settings: dict[str, Any], ids: list[int]) -> Scale | None:
    """Measure how a memory's state grows with its sizes; None where it does not.

    Args:
        base: the model.
        name, settings: of the memory.
        ids: of a text; its first tokens are read, four times as many as the sizes allow.
    """
    sizes = size_fields(memwrap.config_class(name)(**settings))
    if not sizes:
        return None
    largest, measured = max(sizes.values()), []
    for probe in PROBES:
        smaller = scaled(sizes, probe / largest)
        try:
            model = memwrap.wrap(base, name, **{**settings, **smaller}).eval()
        except ValueError:  # its sizes cannot become so small
            return None
        size = model.segment_size
        count = min(len(ids), max(4 * size, 4 * PROBES[1])) // size * size
        row = torch.tensor([ids[:count]], device=model.device)
        state = model.read(row[:, :-size])
        before = state.nbytes
        state = model.read(row[:, -size:], state=state)
        measured.append(state.nbytes)
        memwrap.unwrap(model)
        if probe == PROBES[0] and state.nbytes > before:
            return None  # it keeps the text, whatever its sizes
    slope = (measured[1] - measured[0]) * largest / (PROBES[1] - PROBES[0])
    if measured[1] - measured[0] < 0.01 * measured[0]:
        return None
    return Scale(sizes, measured[0] - slope * PROBES[0] / largest, slope, len(ids))


__all__ = ["SIZES", "Scale", "scale_of", "scaled", "size_fields"]
