"""Ring buffers: full ones overwrite their oldest entry, younger ones have grown as far as they were
needed.

Shapes: B batch, H heads, C slots that the buffer has now, K new rows, D width. Entry number i of a
row of the batch, counted from its beginning, lies in slot i mod `size`. A buffer is never written
in place; everything is differentiable in the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import narrowed


def entries(count: Tensor, capacity: int, size: int) -> Tensor:
    """Give the number of the entry in each slot, `(B, capacity)`; -1 where there is none."""
    slot = torch.arange(capacity, device=count.device)[None]
    last = count[:, None] - 1
    number = last - (last - slot) % size
    return torch.where(slot < count[:, None], number, -1)


def slots(count: Tensor, valid: Tensor, size: int) -> Tensor:
    """Say where new rows go.

    Args:
        count: `(B,)` entries so far.
        valid: `(B, K)` bool, which of the new rows are stored, oldest first.
        size: slots of the full ring.

    Returns:
        `(B, K)` slots; `size` for rows that are not stored, because they are not valid or
        because later ones of the same write would overwrite them.
    """
    rank = valid.cumsum(1) - 1
    stays = valid & (rank >= valid.sum(1, keepdim=True) - size)
    return torch.where(stays, (count[:, None] + rank) % size, size)


def capacity(count: Tensor, present: int, size: int) -> int:
    """Give the slots that the buffer needs for `count` `(B,)` entries; it never gets smaller."""
    if present >= size:
        return present
    return max(present, min(size, int(count.max())))


def most_counted(present: int, size: int) -> int:
    """Give the most entries that a buffer of `present` slots can have got: a full ring any number,
    a younger one no more than it has grown to. None (-1) has more slots than `size`."""
    if present > size:
        return -1
    return 2**53 if present == size else present


def store(buffer: Tensor, slot: Tensor, rows: Tensor, capacity: int) -> Tensor:
    """Write rows into a buffer.

    Args:
        buffer: `(B, H, C, D)`.
        slot: `(B, K)` from `slots`.
        rows: `(B, H, K, D)`.
        capacity: slots of the result, at least C.

    Returns:
        `(B, H, capacity, D)` in the buffer's dtype.
    """
    # What is not stored goes to one slot behind the end, which is cut off again: one more copy,
    # and not needed where it costs nothing to see that all is stored.
    spare = int(slot.device.type != "cpu" or bool((slot >= capacity).any()))
    missing = capacity + spare - buffer.shape[2]
    more = buffer.new_zeros(*buffer.shape[:2], missing, buffer.shape[3])
    slot, rows = slot.clamp_max(capacity), narrowed(rows, buffer.dtype)
    grown = torch.cat([buffer, more], 2)
    if len(slot) == 1:  # whole vectors move
        grown = grown.index_copy_(2, slot[0], rows)
    else:
        grown = grown.scatter_(2, slot[:, None, :, None].expand(rows.shape), rows)
    return grown[:, :, :capacity].contiguous()
