"""Tile sizes: a fixed table, so that every configuration that may run is compiled by the tests.

No autotuner: its choices differ from machine to machine, and it does not run in Triton's
interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

# Head dims of the compressive memory; more does not fit into registers.
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


@dataclass(frozen=True)
class Tiles:
    """Sizes of one launch: channels, values and tokens of a tile, and how it runs."""

    keys: int
    values: int
    tokens: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """Choose the tile that holds `size` channels: a power of two, at least 16 (what `tl.dot`
    takes)."""
    return max(16, triton.next_power_of_2(size))


# (values, tokens, warps) by kernel, for head dims up to 64, 128 and 256: what compiles with no more
# than a few spilled registers on sm_80, sm_90 and sm_100. float32 holds three TF32 parts of each
# operand.
_INFINI = {
    "outer": ((64, 64, 4), (64, 16, 8), (32, 16, 8)),
    "lookup": ((64, 64, 4), (64, 64, 8), (32, 32, 8)),
    "lookup_bwd": ((32, 32, 4), (32, 32, 8), (16, 32, 8)),
    "write_bwd": ((32, 32, 8), (16, 16, 8), (16, 16, 8)),
    "recurrence": ((32, 0, 4), (32, 0, 8), (16, 0, 8)),
    "scan": ((32, 64, 4), (32, 32, 8), (16, 32, 8)),
    "scan_bwd": ((32, 32, 8), (16, 16, 8), (16, 16, 8)),
    "scan_bwd_across": ((32, 16, 8), (16, 16, 8), (16, 16, 8)),
}
_INFINI_FLOAT32 = _INFINI | {
    "outer": ((32, 32, 8), (32, 16, 8)),
    "lookup": ((64, 64, 4), (64, 32, 8)),
    "write_bwd": ((32, 16, 4), (16, 16, 8)),
    "scan": ((32, 32, 8), (16, 16, 8)),
    "scan_bwd": ((16, 16, 8), (16, 16, 8)),
    "scan_bwd_across": ((16, 16, 8), (16, 16, 8)),
}


def infini_tiles(kernel: str, keys: int, values: int, dtype: torch.dtype, hip: bool) -> Tiles:
    """Choose the tiles of a kernel of the compressive memory for head dims up to 256.

    Args:
        kernel: "outer", "recurrence", "lookup", "lookup_bwd", "write_bwd", "scan", "scan_bwd", or
            "scan_bwd_across": its tiles where it walks over all value channels.
        keys, values: Dk and Dv.
        dtype: of the queries or keys.
        hip: AMD: 64 KB of shared memory a program instead of 163 KB or more.
    """
    wide = padded(keys)
    # The recurrence works on states alone, which are float32 for inputs of any dtype.
    full = dtype == torch.float32 and kernel != "recurrence"
    table = _INFINI_FLOAT32 if full else _INFINI
    most, tokens, warps = table[kernel][0 if wide <= 64 else 1 if wide == 128 else 2]
    if hip:
        most, tokens = max(most // 2, 16), max(tokens // 2, 16)
    one = hip or (kernel == "write_bwd" and wide > 128)
    return Tiles(wide, min(most, padded(values)), tokens, warps, 1 if one else 2)


def precision(dtype: torch.dtype, hip: bool) -> str:
    """Tell how `tl.dot` multiplies: half types in TF32, finer than themselves; float32 in three
    TF32 products (24 bits, as float32 itself: its plain form uses no tensor cores and spills)."""
    if hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


# (values, features, tokens, warps); float32 again needs smaller ones.
_ARMT = {
    "read": (64, 32, 64, 4),
    "project": (32, 64, 64, 4),
    "write": (64, 64, 32, 4),
    "features_bwd": (32, 64, 16, 4),
}


def armt_tiles(kernel: str, values: int, dtype: torch.dtype, hip: bool) -> Tiles:
    """Choose the tiles of a kernel of the associative memory; none depends on the number of
    features.

    Args:
        kernel: "read", "project", "write" or "features_bwd".
        values: value channels (for "features_bwd", channels of the raw projection).
        dtype: of the raw projections.
        hip: AMD.
    """
    most, features, tokens, warps = _ARMT[kernel]
    if dtype == torch.float32 and kernel in ("read", "write"):
        most = 32
    return Tiles(features, min(most, padded(values)), tokens, warps, 1 if hip else 2)


# (queries, keys, warps, stages) by kernel, for head dims up to 64, 128 and 256.
_LANDMARK = {
    "forward": ((128, 64, 4, 2), (128, 64, 8, 3), (32, 64, 8, 2)),
    "query_bwd": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
    "key_bwd": ((64, 64, 8, 1), (32, 64, 8, 2), (16, 32, 8, 1)),
}
_LANDMARK_FLOAT32 = {
    "forward": ((32, 32, 8, 1), (32, 32, 8, 1)),
    "query_bwd": ((32, 32, 8, 1), (32, 16, 8, 1)),
    "key_bwd": ((32, 32, 8, 1), (16, 16, 8, 1)),
}


def landmark_tiles(
    kernel: str, width: int, block_size: int, dtype: torch.dtype, hip: bool
) -> Tiles:
    """Choose the tiles of Landmark attention for head dims up to 256: `keys` holds the channels,
    `values` the keys and `tokens` the queries of a tile.

    Args:
        kernel: "forward", "query_bwd" or "key_bwd".
        width: D.
        block_size: tokens of a section: a smaller one takes smaller tiles.
        dtype: of q, k and v.
        hip: AMD.
    """
    wide = padded(width)
    table = _LANDMARK_FLOAT32 if dtype == torch.float32 else _LANDMARK
    queries, most, warps, stages = table[kernel][0 if wide <= 64 else 1 if wide == 128 else 2]
    keys = min(most, padded(block_size))
    if hip:
        queries, stages = max(queries // (4 if kernel == "key_bwd" else 2), 16), 1
        warps = 4  # of 64 lanes each
    # A landmark that is a tile of its own, and a section that is walked twice, take registers.
    apart = block_size % keys == 0 and wide > 64 and kernel != "forward"
    twice = block_size > keys
    if not hip and (apart or (twice and (kernel == "query_bwd" or wide <= 64))):
        queries = max(queries // 2, 16)
    if twice:
        stages = min(stages, 2)
    return Tiles(wide, keys, queries, warps, stages)


def chunk_size(tokens: int) -> int:
    """Choose the tokens of a chunk of the recurrent kernels: a power of two from 16 to 64."""
    return min(64, padded(tokens))


# (key channels, value channels, warps) by kernel; head dims of any size are walked in such steps.
_GLA = {
    "states": (64, 64, 4),
    "scores": (32, 64, 4),
    "output": (32, 64, 4),
    "values_bwd": (32, 64, 4),
    "keys_bwd": (32, 32, 8),
    "readers_bwd": (64, 64, 4),
}
_GLA_FLOAT32 = {
    "states": (32, 32, 8),
    "scores": (32, 32, 8),
    "output": (32, 32, 8),
    "values_bwd": (32, 32, 8),
    "keys_bwd": (16, 16, 8),
    "readers_bwd": (32, 32, 8),
}
# The delta rule holds all key channels of a state: (value channels, warps) for up to 64, 128, 256.
_DELTA = ((32, 4), (32, 8), (16, 8))


def gla_tiles(
    kernel: str, keys: int, values: int, gate: int, dtype: torch.dtype, hip: bool
) -> Tiles:
    """Choose the tiles of gated linear attention.

    Args:
        kernel: "states", "scores", "output", "values_bwd" or "keys_bwd".
        keys, values: Dk and Dv.
        gate: 0 none, 1 a number, 2 a vector.
        dtype: of q, k and v.
        hip: AMD.
    """
    wide, most, warps = (_GLA_FLOAT32 if dtype == torch.float32 else _GLA)[kernel]
    if hip and kernel == "keys_bwd":
        wide, warps = 16, 4  # of 64 lanes each
    # Scores run over channels of keys, or of values for their gradients.
    width = max(keys, values) if kernel == "scores" else keys
    return Tiles(min(wide, padded(width)), min(most, padded(values)), 0, warps, 1 if hip else 2)


def delta_tiles(keys: int, dtype: torch.dtype, hip: bool) -> Tiles:
    """Choose the tiles of what goes from chunk to chunk in the delta rule, for keys of up to 256
    channels."""
    wide = padded(keys)
    values, warps = _DELTA[0 if wide <= 64 else 1 if wide == 128 else 2]
    if hip or dtype == torch.float32:
        values = 16
    if hip and wide > 128:
        warps = 4  # of 64 lanes each
    return Tiles(wide, values, 0, warps, 1)
