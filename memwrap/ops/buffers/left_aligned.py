"""Entries at the left end of a buffer, oldest first: the first `count` slots are filled.

Shapes: B batch, N given rows, C slots of a buffer, D width. Slots that are not filled are zero,
so that two buffers with the same rows are equal. Everything is differentiable in the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.buffers import filled, take


def earliest(valid: Tensor, count: int) -> Tensor:
    """Give the indices `(B, count)` that put the first `count` valid rows of `valid` `(B, N)` at
    the left end."""
    return (~valid).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def append(buffer: Tensor, count: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Put rows behind those that are there; of too many the oldest go (first in, first out).

    Args:
        buffer: `(B, C, D)`.
        count: `(B,)` filled slots.
        new: `(B, N, D)`, oldest first.

    Returns:
        The new buffer `(B, C, D)` in `buffer`'s dtype, and its count.
    """
    size, more = buffer.shape[1], new.shape[1]
    both = torch.cat([buffer, new.to(buffer.dtype)], 1)
    total = count + more
    # The i-th kept row, counted over the old and the new ones.
    kept = torch.arange(size, device=count.device) + (total - size).clamp(min=0)[:, None]
    source = torch.where(kept < count[:, None], kept, size + kept - count[:, None])
    count = total.clamp(max=size)
    return take(both, source.clamp(max=size + more - 1), filled(count, size)), count


def take_last(
    values: Tensor, mask: Tensor, limit: Tensor | int, size: int
) -> tuple[Tensor, Tensor]:
    """Take the last chosen rows.

    Args:
        values: `(B, N, D)`.
        mask: `(B, N)` bool, the chosen rows.
        limit: at most so many, `(B,)` or for all; no more than `size`.
        size: slots of the result.

    Returns:
        `(B, size, D)`, in their order, and their number `(B,)`.
    """
    mask = mask.to(values.device)
    if values.shape[1] < size:
        missing = size - values.shape[1]
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        mask = torch.nn.functional.pad(mask, (0, missing))
    limit = torch.as_tensor(limit, device=values.device).expand(values.shape[0])
    rank_from_end = mask.flip(1).cumsum(1).flip(1)
    keep = mask & (rank_from_end <= limit[:, None])
    count = keep.sum(1)
    return take(values, earliest(keep, size), filled(count, size)), count
