"""Tile sizes: a fixed table, so that every configuration that may run is compiled by the tests.

No autotuner: its choices differ from machine to machine, and it does not run in Triton's
interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: channels, values and tokens of a tile, and how it runs."""

    keys: int
    values: int
    tokens: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The tile that holds `size` channels: a power of two, at least 16 (what `tl.dot` takes)."""
    return max(16, triton.next_power_of_2(size))


def infini_tiles(kernel: str, keys: int, values: int, hip: bool) -> Tiles:
    """Tiles of a kernel of the compressive memory for head dims up to 256.

    Args:
        kernel: "outer", "recurrence", "lookup", "lookup_bwd" or "write_bwd".
        keys, values: Dk and Dv.
        hip: AMD: 64 KB of shared memory a program instead of 163 KB or more.
    """
    wide = padded(keys)
    most = {"outer": 64, "recurrence": 32, "lookup": 64, "lookup_bwd": 32, "write_bwd": 32}[kernel]
    if wide > 128 or hip:
        most //= 2
    tokens = 32 if wide > 64 or hip else 64
    if wide > 128 and hip:
        tokens = 16
    return Tiles(wide, min(most, padded(values)), tokens, 8 if wide > 64 else 4, 1 if hip else 2)


def precision(dtype: torch.dtype, hip: bool) -> str:
    """How `tl.dot` multiplies: float32 exactly; half types in TF32, finer than themselves."""
    return "ieee" if dtype == torch.float32 or hip else "tf32"
