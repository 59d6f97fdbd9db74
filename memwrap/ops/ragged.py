"""Rows of different lengths in buffers of one size: the first `count` places are filled.

Shapes: B batch, N given rows, C places of a buffer, D width. Places that are not filled are zero,
so that two buffers with the same rows are equal. Everything is differentiable in the values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filled(count: Tensor, size: int) -> Tensor:
    """Which of `size` places are filled, `(B, size)` bool, for `count` `(B,)`."""
    return torch.arange(size, device=count.device)[None, :] < count[:, None]


def append(buffer: Tensor, count: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Put rows behind those that are there; of too many the oldest go (first in, first out).

    Args:
        buffer: `(B, C, D)`.
        count: `(B,)` filled places.
        new: `(B, N, D)`, oldest first.

    Returns:
        The new buffer `(B, C, D)` in `buffer`'s dtype, and its count.
    """
    size, more = buffer.shape[1], new.shape[1]
    both = torch.cat([buffer, new.to(buffer.dtype)], 1)
    total = count + more
    # The i-th kept row, counted over the old and the new ones.
    kept = torch.arange(size, device=count.device) + (total - size).clamp(min=0)[:, None]
    place = torch.where(kept < count[:, None], kept, size + kept - count[:, None])
    place = place.clamp(max=size + more - 1)[..., None].expand(-1, -1, both.shape[-1])
    count = total.clamp(max=size)
    return both.gather(1, place) * filled(count, size)[..., None], count


def take_last(
    values: Tensor, chosen: Tensor, most: Tensor | int, size: int
) -> tuple[Tensor, Tensor]:
    """The last chosen rows.

    Args:
        values: `(B, N, D)`.
        chosen: `(B, N)` bool.
        most: at most so many, `(B,)` or for all; no more than `size`.
        size: places of the result.

    Returns:
        `(B, size, D)`, in their order, and their number `(B,)`.
    """
    chosen = chosen.to(values.device)
    if values.shape[1] < size:
        missing = size - values.shape[1]
        values = torch.nn.functional.pad(values, (0, 0, 0, missing))
        chosen = torch.nn.functional.pad(chosen, (0, missing))
    most = torch.as_tensor(most, device=values.device).expand(values.shape[0])
    rank_from_end = chosen.flip(1).cumsum(1).flip(1)
    keep = chosen & (rank_from_end <= most[:, None])
    count = keep.sum(1)
    place = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :size]
    rows = values.gather(1, place[..., None].expand(-1, -1, values.shape[-1]))
    return rows * filled(count, size)[..., None], count
