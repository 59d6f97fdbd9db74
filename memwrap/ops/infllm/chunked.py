"""The block memory of InfLLM in fast torch; arguments and shapes in `memwrap.ops.infllm`."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype


def gather_chunked(
    query: Tensor, starts: Tensor, valid: Tensor, total: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = query.shape
    made = starts.sum(1)
    groups = (int(made.max()) if length else 0) + 1
    group = starts.long().cumsum(1) - starts.long()  # a start closes the group before it
    sums = query.new_zeros(batch, groups, heads, width)
    sums[:, 0] = total
    rows = torch.arange(batch, device=query.device)
    place = (rows[:, None] * groups + group).flatten()
    tokens = (query.transpose(1, 2) * valid[..., None, None]).flatten(0, 1)
    sums = sums.flatten(0, 1).index_add(0, place, tokens).unflatten(0, (batch, groups))
    counts = torch.zeros(batch, groups, dtype=count.dtype, device=count.device)
    counts[:, 0] = count
    counts = counts.scatter_add(1, group, valid.to(count.dtype))
    means = sums[:, :-1] / counts[:, :-1].clamp_min(1)[..., None, None]
    present = torch.arange(groups - 1, device=query.device) < made[:, None]
    return means * present[..., None, None], sums[rows, made], counts[rows, made]


def select_chunked(scores: Tensor, units: Tensor, top_k: int) -> Tensor:
    number = scores.shape[2]
    present = torch.arange(number, device=scores.device) < units[:, None, None]
    scores = scores.masked_fill(~present, float("-inf"))
    best = scores.flip(2).argsort(dim=2, descending=True, stable=True)[..., :top_k]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(2, best.neg() + (number - 1), True) & present


def representatives_chunked(keys: Tensor, scores: Tensor, count: int) -> Tensor:
    groups = scores.shape[2] // keys.shape[2]
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    wide = keys.repeat_interleave(groups, 2)
    picked = wide.gather(3, best[..., None].expand(*best.shape, wide.shape[-1]))
    return picked.to(accumulation_dtype(keys)).mean(3).to(keys.dtype)


def received_chunked(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    groups, wide = query.shape[1] // key.shape[1], accumulation_dtype(query)
    products = query.to(wide) @ key.to(wide).repeat_interleave(groups, 1).transpose(2, 3)
    return (products * visible[:, None]).sum(2)
