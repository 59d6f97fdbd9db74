"""Buffers of a state: rows of a batch hold different numbers of entries in tensors of one size.

- `ring`: the oldest entry is overwritten; it stays where it is until then.
- `least_used`: the entry that was not used for longest goes, and those behind it move up.
- `left_aligned`: entries stand at the left, oldest first; an append may move them.
- `right_aligned`: entries stand at the right, so that the youngest is always the last.
- `paged`: entries are appended without copying, in pages that states share.
- `kept`: what is made of a tensor lives beside it.
- `host_prefetch`: what lies in the host's memory, fetched before it is needed.

Shapes: B batch, H heads, N entries, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filled(count: Tensor, size: int) -> Tensor:
    """Tell which of `size` slots are filled, `(B, size)` bool: the first `count` `(B,)`."""
    return torch.arange(size, device=count.device)[None] < count[:, None]


def take(x: Tensor, index: Tensor, valid: Tensor | None = None) -> Tensor:
    """Take the rows `index` `(B, M)` of `x` `(B, N, D)` or `(B, H, N, D)`; zeros where `valid`
    `(B, M)` is false."""
    inner = [1] * (x.dim() - 3)
    if len(index) == 1:
        rows = x.index_select(-2, index[0])
    elif x.device.type == "cpu" and len(index):  # whole vectors move, and not each number by itself
        rows = torch.stack([of.index_select(-2, at) for of, at in zip(x, index, strict=True)])
    else:
        shape = *x.shape[:-2], index.shape[1], x.shape[-1]
        rows = x.gather(-2, index.view(len(index), *inner, -1, 1).expand(shape))
    return rows if valid is None else rows * valid.view(len(valid), *inner, -1, 1)
