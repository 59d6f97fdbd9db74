"""Buffers that drop what was not used for longest: entries stand from the left, in the order in
which they were written, and move up when one before them goes.

A use is noted as a time, `last_used` `(B, C)` for a buffer of C slots; -1 where no entry is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.buffers import ring


@torch.no_grad()
def mark(last_used: Tensor, slot: Tensor, valid: Tensor, time: Tensor) -> Tensor:
    """Note when entries were retrieved last.

    Args:
        last_used: `(B, C)`; -1 for an entry that is not there.
        slot: `(B, M, N)` slots that were retrieved.
        valid: `(B, M, N)` bool; others are not noted.
        time: `(B,)`.
    """
    size = last_used.shape[1]
    index = torch.where(valid, slot, size).flatten(1)
    spare = torch.nn.functional.pad(last_used, (0, 1))
    return spare.scatter(1, index, time[:, None].expand_as(index))[:, :size]


@torch.no_grad()
def replace(last_used: Tensor, count: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make room for new entries: where they fit they stand behind the others, else as many as come
    go, those that were retrieved longest ago (the first of equal ones), and the rest move up.

    Args:
        last_used: `(B, C)`; -1 at slots without an entry.
        count: `(B,)` entries written so far.
        valid: `(B, K)` bool, which of the new ones are stored, oldest first.

    Returns:
        Places of the old entries `(B, C)` and of the new ones `(B, K)`, C for those that are not
        kept; and `last_used` after the write, which counts as a use.
    """
    size, more = last_used.shape[1], valid.sum(1)
    fits = (count + more <= size)[:, None]
    rank = last_used.argsort(dim=1, stable=True).argsort(1)
    stays = fits | (rank >= more[:, None])
    old = torch.where(fits, torch.arange(size, device=count.device), stays.cumsum(1) - 1)
    old = torch.where(stays, old, size)
    first = torch.where(fits[:, 0], count, size - more)  # negative: only the last of them fit
    new = first[:, None] + valid.cumsum(1) - 1
    new = torch.where(valid & (new >= 0), new, size)
    after = last_used.new_full((len(count), size + 1), -1).scatter(1, old, last_used)
    after = after.scatter(1, new, (count + more)[:, None].expand_as(new))
    return old, new, after[:, :size]


def store(buffer: Tensor, old: Tensor, new: Tensor, rows: Tensor, capacity: int) -> Tensor:
    """Move the entries of a buffer `(B, H, C, D)` to `old` `(B, C)` and write `rows` `(B, H, K, D)`
    at `new` `(B, K)`: `(B, H, capacity, D)`."""
    moved = ring.store(buffer[:, :, :0], old[:, : buffer.shape[2]], buffer, capacity)
    return ring.store(moved, new, rows, capacity)
