"""Ring buffers of rows: full ones overwrite their oldest row, younger ones have grown as far as
they were needed.

Shapes: B batch, H heads, C rows that the buffer has now, K new rows, D width. Entry number i of a
row of the batch, counted from its beginning, lies at place i mod `size`. A buffer is never written
in place; everything is differentiable in the values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filled(count: Tensor, capacity: int) -> Tensor:
    """Which of `capacity` places hold an entry, `(B, capacity)` bool, after `count` `(B,)`."""
    return torch.arange(capacity, device=count.device)[None] < count[:, None]


def entries(count: Tensor, capacity: int, size: int) -> Tensor:
    """The number of the entry at each place, `(B, capacity)`; -1 where there is none."""
    place = torch.arange(capacity, device=count.device)[None]
    last = count[:, None] - 1
    number = last - (last - place) % size
    return torch.where(place < count[:, None], number, -1)


def places(count: Tensor, valid: Tensor, size: int) -> Tensor:
    """Where new rows go.

    Args:
        count: `(B,)` entries so far.
        valid: `(B, K)` bool, which of the new rows are stored, oldest first.
        size: places of the full ring.

    Returns:
        `(B, K)` places; `size` for rows that are not stored, because they are not valid or
        because later ones of the same write would overwrite them.
    """
    rank = valid.cumsum(1) - 1
    stays = valid & (rank >= valid.sum(1, keepdim=True) - size)
    return torch.where(stays, (count[:, None] + rank) % size, size)


def capacity(count: Tensor, present: int, size: int) -> int:
    """Places that the buffer needs for `count` `(B,)` entries; it never gets smaller."""
    if present >= size:
        return present
    return max(present, min(size, int(count.max())))


def store(buffer: Tensor, place: Tensor, rows: Tensor, capacity: int) -> Tensor:
    """The buffer with rows written.

    Args:
        buffer: `(B, H, C, D)`.
        place: `(B, K)` from `places`.
        rows: `(B, H, K, D)`.
        capacity: places of the result, at least C.

    Returns:
        `(B, H, capacity, D)` in the buffer's dtype.
    """
    # What is not stored goes to one place behind the end, which is cut off again: one more copy,
    # and not needed where it costs nothing to see that all is stored.
    spare = int(place.device.type != "cpu" or bool((place >= capacity).any()))
    missing = capacity + spare - buffer.shape[2]
    more = buffer.new_zeros(*buffer.shape[:2], missing, buffer.shape[3])
    index = place.clamp_max(capacity)[:, None, :, None].expand(rows.shape)
    grown = torch.cat([buffer, more], 2).scatter_(2, index, rows.to(buffer.dtype))
    return grown[:, :, :capacity].contiguous()
