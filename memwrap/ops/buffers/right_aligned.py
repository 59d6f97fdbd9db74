"""Entries at the right end of a buffer: the youngest is the last, whatever a row's count is."""

from __future__ import annotations

import torch
from torch import Tensor


def lengthened(rows: Tensor, count: int) -> Tensor:
    """Make a buffer `(B, H, C, ...)` one of at least `count` slots: zeros come in front."""
    missing = count - rows.shape[2]
    if missing <= 0:
        return rows
    return torch.cat([rows.new_zeros(*rows.shape[:2], missing, *rows.shape[3:]), rows], 2)


def latest(valid: Tensor, count: int) -> Tensor:
    """Give the indices `(B, count)` that put the last `count` valid rows of `valid` `(B, N)` at the
    right end, in their order. Where fewer are valid, the left slots hold invalid rows."""
    order = valid.to(torch.int8).argsort(dim=1, stable=True)
    return order[:, order.shape[1] - count :]


def right_valid(lengths: Tensor, size: int) -> Tensor:
    """Tell which of `size` slots are filled, `(B, size)` bool: the last `lengths` `(B,)`."""
    return torch.arange(size, 0, -1, device=lengths.device)[None] <= lengths[:, None]
