"""Exact search for nearest rows: the scores of all queries with all entries never exist at once.

Shapes: `...` leading dimensions (batch rows, heads), Q queries, N entries, D width, K neighbours.
Metrics: `"l2"` is the squared Euclidean distance, smallest first; `"ip"` the inner product,
largest first. Scores are float32 (float64 for float64 queries).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend

METRICS = ("l2", "ip")
# Numbers of the scores of one block, and of the rows gathered to make the found ones exact.
_BLOCK = 2**22
# Entries of one block at most: what is computed of them stays in the processor's cache.
_ROWS = 2**15


def worst(metric: str) -> float:
    """Return the score of a neighbour that is not there."""
    return math.inf if metric == "l2" else -math.inf


def naive(
    queries: Tensor, keys: Tensor, k: int, metric: str = "l2", valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute as specified: all scores, then a sort. See `nearest`."""
    work = accumulation_dtype(queries)
    q, e = queries.to(work), keys.to(work)
    if metric == "l2":
        scores = (q[..., :, None, :] - e[..., None, :, :]).square().sum(-1)
    else:
        scores = (q[..., :, None, :] * e[..., None, :, :]).sum(-1)
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None, :], worst(metric))
    order = scores.argsort(dim=-1, descending=metric == "ip", stable=True)[..., :k]
    best = scores.gather(-1, order)
    return _filled(best, order.masked_fill(best.isinf(), -1), k, metric)


def nearest(
    queries: Tensor, keys: Tensor, k: int, metric: str = "l2", valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the `k` best entries of every query.

    Args:
        queries: `(..., Q, D)`.
        keys: `(..., N, D)` with the same leading dimensions.
        k: neighbours wanted.
        metric: `"l2"` or `"ip"`.
        valid: `(..., N)` bool, entries that are there; None for all.

    Returns:
        Scores `(..., Q, k)`, best first and differentiable in queries and keys, and the entries'
        numbers `(..., Q, k)`: -1, with an infinite score, where there are fewer than `k`.

    Raises:
        ValueError: for another metric, or `k` below 1.
    """
    if metric not in METRICS:
        raise ValueError(f"`metric` is {metric!r}; allowed: 'l2' (squared distance), 'ip'.")
    if k < 1:
        raise ValueError(f"`k` is {k}; it must be at least 1.")
    if current_backend() == "naive":
        return naive(queries, keys, k, metric, valid)
    lead = keys.shape[:-2]
    width = max(1, _BLOCK // max(1, math.prod(lead) * min(k, keys.shape[-2]) * keys.shape[-1]))
    parts = [_part(q, keys, k, metric, valid) for q in queries.split(width, -2)]
    if not parts:
        empty = queries.new_empty(*queries.shape[:-1], k, dtype=accumulation_dtype(queries))
        return empty, empty.long()
    return torch.cat([s for s, _ in parts], -2), torch.cat([i for _, i in parts], -2)


def _part(
    queries: Tensor, keys: Tensor, k: int, metric: str, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find `nearest` for as many queries as may be gathered at once: found by expanded distances
    block by block, then scored exactly (differences, not a difference of large sums)."""
    with torch.no_grad():
        index = _search(queries.detach(), keys.detach(), k, metric, valid)
    work = accumulation_dtype(queries)
    candidates = take(keys, index).to(work)
    q = queries.to(work)[..., None, :]
    scores = (q - candidates).square().sum(-1) if metric == "l2" else (q * candidates).sum(-1)
    scores = scores.masked_fill(index < 0, worst(metric))
    order = scores.detach().argsort(dim=-1, descending=metric == "ip", stable=True)
    return _filled(scores.gather(-1, order), index.gather(-1, order), k, metric)


def _search(queries: Tensor, keys: Tensor, k: int, metric: str, valid: Tensor | None) -> Tensor:
    """Return numbers `(..., Q, min(k, N))` of the best entries, unordered, -1 for those not
    there."""
    work = accumulation_dtype(queries)
    q, count = queries.to(work), keys.shape[-2]
    q = 2 * q if metric == "l2" else q
    block = max(k, min(_ROWS, _BLOCK // max(1, math.prod(queries.shape[:-1]))))
    best = q.new_empty(*q.shape[:-1], 0)
    index = torch.empty(*q.shape[:-1], 0, dtype=torch.long, device=q.device)
    for start in range(0, count, block):
        part = keys[..., start : start + block, :].to(work)
        score = q @ part.transpose(-1, -2)  # larger is better; from here in place: it is large
        if metric == "l2":
            score -= part.square().sum(-1)[..., None, :]
        if valid is not None:
            score.masked_fill_(~valid[..., None, start : start + block], -math.inf)
        top, place = score.topk(min(k, score.shape[-1]), -1, sorted=False)
        best, index = torch.cat([best, top], -1), torch.cat([index, place + start], -1)
        if best.shape[-1] > k:
            best, chosen = best.topk(k, -1, sorted=False)
            index = index.gather(-1, chosen)
    return index.masked_fill(best == -math.inf, -1)


def take(keys: Tensor, index: Tensor) -> Tensor:
    """Return the entries `index` `(..., Q, K)` of `keys` `(..., N, D)`: `(..., Q, K, D)`; some
    entry where the index is -1."""
    flat = index.clamp_min(0).flatten(-2)[..., None].expand(*index.shape[:-2], -1, keys.shape[-1])
    return keys.gather(-2, flat).unflatten(-2, index.shape[-2:])


def _filled(scores: Tensor, index: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    missing = k - scores.shape[-1]
    if missing <= 0:
        return scores, index
    pad = torch.nn.functional.pad
    return pad(scores, (0, missing), value=worst(metric)), pad(index, (0, missing), value=-1)
