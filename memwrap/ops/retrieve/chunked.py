"""Retrieval attention in fast torch: entries in chunks, queries in blocks; arguments as in
`memwrap.ops.retrieve`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memwrap.ops import accumulation_dtype

# At most so many scores, and so many numbers of gathered rows, exist at one time.
_SCORES_AT_ONCE = 2**24
_ENTRIES_LEAST, _ENTRIES_AT_ONCE = 2**10, 2**14
_GATHERED_AT_ONCE = 2**25
_HIDDEN = -1e30
_BLOCK = 16  # scores whose largest is found first


def normalise(x: Tensor) -> Tensor:
    """Make unit vectors: `x / max(|x|, 1e-12)` along the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """Take entries of a cache `(B, Hkv, N, D)` at `index` `(B, H, T, k)`: `(B, H, T, k, D)`. Where
    the index is -1 stands entry 0."""
    width, flat = rows.shape[-1], _flat(rows, index).flatten()
    return rows.reshape(-1, width).index_select(0, flat).view(*index.shape, width)


def _flat(rows: Tensor, index: Tensor) -> Tensor:
    """Count the entries `index` of `gather` over all rows and heads."""
    batch, heads, count, _ = rows.shape
    group = index.shape[1] // heads
    first = torch.arange(batch * heads, device=rows.device) * count
    first = first.view(batch, heads).repeat_interleave(group, 1)
    return index.clamp_min(0) + first[:, :, None, None]


def attend_chunked(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, scales: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the entries `index`, a block of queries at a time: output, log-sum-exp, weights."""
    per_query = query.shape[0] * query.shape[1] * index.shape[3]
    size = max(1, _GATHERED_AT_ONCE // (per_query * (keys.shape[-1] + values.shape[-1])))
    blocks = list(zip(query.split(size, 2), index.split(size, 2), strict=True))
    parts = []
    for q, i in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():  # gathered rows are not kept
            part = checkpoint(_block, q, keys, values, i, scales, cap, use_reentrant=False)
        else:
            part = _block(q, keys, values, i, scales, cap)
        parts.append(part)
    out, logsumexp, weights = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out, logsumexp, weights


def _block(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, scales: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = scales.dtype
    rows = gather(keys, index).to(wide)
    scores = (rows @ query[..., None].to(wide)).squeeze(-1) * scales[:, None, None]
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    present = index >= 0
    scores = scores.masked_fill(~present, _HIDDEN)
    weights = scores.softmax(-1) * present
    total = scores.logsumexp(-1).masked_fill(~present.any(-1), -math.inf)
    if torch.is_grad_enabled() or values.dtype != wide:
        return (weights[..., None, :] @ gather(values, index).to(wide)).squeeze(-2), total, weights
    flat, width = _flat(values, index).flatten(0, 2), values.shape[-1]
    out = torch.nn.functional.embedding_bag(
        flat, values.reshape(-1, width), mode="sum", per_sample_weights=weights.flatten(0, 2)
    )
    return out.view(*index.shape[:3], width), total, weights


def search_chunked(
    query: Tensor, keys: Tensor, valid: Tensor, top_k: int, similarity: str
) -> tuple[Tensor, Tensor]:
    """Search as `search` does, but leave some index where the similarity is -inf."""
    batch, heads, count, width = keys.shape
    grouped = query.reshape(batch, heads, -1, width).to(accumulation_dtype(query))
    if similarity == "cosine":
        grouped = normalise(grouped)
    elif similarity == "l2":
        grouped = 2 * grouped
    # As many queries as leave entries enough for a product worth its name.
    most = max(1, _SCORES_AT_ONCE // max(1, batch * heads * min(count, _ENTRIES_LEAST)))
    parts = [_best(q, keys, valid, top_k, similarity) for q in grouped.split(most, 2)]
    if not parts:
        parts = [_best(grouped, keys, valid, top_k, similarity)]
    best, index = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    shape = (*query.shape[:3], best.shape[-1])
    return best.reshape(shape), index.reshape(shape)


def _best(
    grouped: Tensor, keys: Tensor, valid: Tensor, top_k: int, similarity: str
) -> tuple[Tensor, Tensor]:
    """Find the best of all entries, chunk by chunk, for queries `(B, Hkv, M, D)`: unit vectors
    for `"cosine"`, doubled for `"l2"`."""
    count = keys.shape[2]
    size = _SCORES_AT_ONCE // max(1, math.prod(grouped.shape[:3]))
    size = min(max(1, size), _ENTRIES_AT_ONCE)
    best = grouped.new_empty(*grouped.shape[:3], 0)
    index = torch.empty(best.shape, dtype=torch.long, device=keys.device)
    whole = keys.device.type == "cpu" and bool(valid.all())  # mostly, and nothing to hide
    for start in range(0, count, size):
        part = keys[:, :, start : start + size].to(grouped.dtype)
        if similarity == "cosine":
            part = normalise(part)
        scores = grouped @ part.transpose(-1, -2)  # from here in place: it is large
        if similarity == "l2":
            scores -= part.square().sum(-1)[:, :, None]
        if not whole:
            scores.masked_fill_(~valid[:, None, None, start : start + size], -math.inf)
        values, places = first_largest(scores, top_k)
        if not start:
            best, index = values, places
            continue
        both = torch.cat([best, values], -1)
        order = both.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        index = torch.cat([index, places + start], -1).gather(-1, order)
        best = both.gather(-1, order)
    return best, index


def first_largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest of the last dimension, descending; of equal ones those that come
    first.

    `topk` leaves open which of equal ones it takes. A query of zero (some models embed padding as
    zero) is equally similar to everything, and which entries it gets must not depend on how text
    is fed.
    """
    total = scores.shape[-1]
    count = min(count, total)
    top, places = _largest(scores, min(count + 1, total))
    if scores.device.type == "cpu" and not bool((top[..., 1:] == top[..., :-1]).any()):
        return top[..., :count], places[..., :count]
    if count < total:
        last = top[..., count - 1]
        tied = (last == top[..., count]) & (last > -math.inf)
        places = places[..., :count]
        if bool(tied.any()):
            order = scores[tied].sort(dim=-1, descending=True, stable=True).indices
            places = places.clone()
            places[tied] = order[..., :count]
    places = places.sort(-1).values
    ordered = scores.gather(-1, places).sort(dim=-1, descending=True, stable=True)
    return ordered.values, places.gather(-1, ordered.indices)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest of the last dimension, descending, as `topk` does.

    On a CPU `topk` looks at every score by itself. The least of the largest scores of `count` blocks
    is no greater than the last one that is wanted, and mostly little else reaches it.
    """
    total, rows = scores.shape[-1], scores.shape[:-1].numel()
    blocks = total // _BLOCK
    if scores.device.type != "cpu" or scores.element_size() < 4 or blocks < 4 * count or not rows:
        return scores.topk(count, -1)
    flat = scores.reshape(rows, total)
    most = flat[:, : blocks * _BLOCK].view(rows, _BLOCK // 2, -1).amax(1)
    most = most.view(rows, 2, blocks).amax(1)  # in two steps: long rows are fast
    least = np.partition(most.numpy(), blocks - count, axis=-1)[:, blocks - count, None]
    found = torch.from_numpy(np.flatnonzero(flat.numpy() >= least))
    row = found.div(total, rounding_mode="floor")
    number = torch.bincount(row, minlength=rows)
    width = int(number.max())
    # Where many scores are equal, or there are few at all, nothing is won; NaN is not found.
    if width > total // 4 or int(number.min()) < count:
        return scores.topk(count, -1)
    first = number.cumsum(0) - number
    slot = row * width + torch.arange(len(found)) - first.index_select(0, row)
    values = flat.new_full((rows * width,), -math.inf)
    values = values.index_copy(0, slot, flat.view(-1).index_select(0, found))
    places = row.new_zeros(rows * width).index_copy(0, slot, found - row * total)
    top = values.view(rows, width).topk(count, -1)
    index = places.view(rows, width).gather(1, top.indices)
    return top.values.view(*scores.shape[:-1], count), index.view(*scores.shape[:-1], count)
