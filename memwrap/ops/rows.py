"""Rows of a bounded buffer: which of many rows with gaps are kept, and taking them.

Buffers hold rows along their second to last dimension. What rows of a batch have to offer
differs in length; kept rows stand together at one end, so that a count says which are valid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def latest(valid: Tensor, count: int) -> Tensor:
    """Indices `(B, count)` that put the last `count` valid rows of `valid` `(B, N)` at the right
    end, in their order. Where fewer are valid, the left places hold invalid rows."""
    order = valid.to(torch.int8).argsort(dim=1, stable=True)
    return order[:, order.shape[1] - count :]


def earliest(valid: Tensor, count: int) -> Tensor:
    """Indices `(B, count)` that put the first `count` valid rows at the left end."""
    return (~valid).to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def take(x: Tensor, index: Tensor, valid: Tensor | None = None) -> Tensor:
    """The rows `index` `(B, M)` of `x` `(B, N, D)` or `(B, H, N, D)`; zeros where `valid`
    `(B, M)` is false."""
    inner = [1] * (x.dim() - 3)
    place = index.view(len(index), *inner, -1, 1).expand(*x.shape[:-2], index.shape[1], x.shape[-1])
    rows = x.gather(-2, place)
    return rows if valid is None else rows * valid.view(len(valid), *inner, -1, 1)


def right_valid(lengths: Tensor, size: int) -> Tensor:
    """`(B, size)` bool, true at the last `lengths` `(B,)` places."""
    return torch.arange(size, 0, -1, device=lengths.device)[None] <= lengths[:, None]
