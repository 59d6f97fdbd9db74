"""Retrieval attention: every query attends to its `top_k` best entries of a large cache.

Shapes: B batch, H query heads, Hkv heads of the cache, G = H / Hkv, T queries, N entries, D and Dv
widths of keys and values, k = min(top_k, N). Query head h searches the cache of head h // G, which
is never repeated. Which entries are chosen has no gradient; their keys and values have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memwrap.ops import accumulation_dtype, current_backend

SIMILARITIES = ("dot", "cosine", "l2")
# At most so many scores, and so many numbers of gathered rows, exist at one time.
_SCORES_AT_ONCE = 2**24
_ENTRIES_LEAST, _ENTRIES_AT_ONCE = 2**10, 2**14
_GATHERED_AT_ONCE = 2**25
_HIDDEN = -1e30


@dataclass(frozen=True)
class Read:
    """What queries got from a cache.

    Attributes:
        out: `(B, H, T, Dv)`, the weighted mean of the retrieved values; 0 where there are none.
        logsumexp: `(B, H, T)` of the retrieved scores; -inf where there are none.
        index: `(B, H, T, k)` entries, best first; -1 where there are fewer or one is left out.
        weights: `(B, H, T, k)`, sums to 1 (to 0 where there are none).
    """

    out: Tensor
    logsumexp: Tensor
    index: Tensor
    weights: Tensor


def normalise(x: Tensor) -> Tensor:
    """Unit vectors: `x / max(|x|, 1e-12)` along the last dimension."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def search(
    query: Tensor, keys: Tensor, valid: Tensor, top_k: int, *, similarity: str = "dot"
) -> tuple[Tensor, Tensor]:
    """The most similar entries, exactly.

    Queries x entries are never held at once: entries are looked through in chunks, of which the
    best are kept. Similarities are computed in float32 (float64 for float64). Of equally
    similar entries those that come first are taken.

    Args:
        query: `(B, H, T, D)`.
        keys: `(B, Hkv, N, D)`.
        valid: `(B, N)` bool.
        top_k: most entries of each query.
        similarity: `"dot"` q.k, `"cosine"`, or `"l2"`, which is 2 q.k - |k|^2.

    Returns:
        Similarities `(B, H, T, k)`, descending, -inf where there are fewer valid entries, and
        their index `(B, H, T, k)`, -1 there.

    Raises:
        ValueError: for an unknown similarity.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"`similarity` is {similarity!r}; allowed: {', '.join(SIMILARITIES)}.")
    if current_backend() == "naive":
        found = _search_naive(query, keys, valid, top_k, similarity)
    else:
        found = _search_chunked(query, keys, valid, top_k, similarity)
    return found[0], found[1].masked_fill(found[0] == -math.inf, -1)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    top_k: int,
    *,
    scale: float | Tensor,
    similarity: str = "dot",
    threshold: float | None = None,
    softcap: float | None = None,
) -> Read:
    """Softmax attention over each query's most similar entries alone.

    Args:
        query, keys, valid, top_k, similarity: as in `search`.
        values: `(B, Hkv, N, Dv)`.
        scale: of the scores q.k, one number or `(H,)`.
        threshold: entries that are no more similar than this are left out.
        softcap: scores s become `softcap * tanh(s / softcap)`.
    """
    found, index = search(query, keys, valid, top_k, similarity=similarity)
    if threshold is not None:
        index = index.masked_fill(found <= threshold, -1)
    return attend_to(query, keys, values, index, scale=scale, softcap=softcap)


def attend_to(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    scale: float | Tensor,
    softcap: float | None = None,
) -> Read:
    """As `attend`, over entries chosen before: `index` `(B, H, T, k)`, -1 for none."""
    wide = accumulation_dtype(query)
    scales = torch.as_tensor(scale, dtype=wide, device=query.device).expand(query.shape[1])
    if index.shape[-1] == 0:
        out = query.new_zeros(*query.shape[:3], values.shape[-1], dtype=wide)
        weights = out.new_zeros(index.shape)
        return Read(out, out.new_full(query.shape[:3], -math.inf), index, weights)
    if current_backend() == "naive":
        return _attend_naive(query, keys, values, index, scales, softcap)
    per_query = query.shape[0] * query.shape[1] * index.shape[3]
    size = max(1, _GATHERED_AT_ONCE // (per_query * (keys.shape[-1] + values.shape[-1])))
    blocks = list(zip(query.split(size, 2), index.split(size, 2), strict=True))
    parts = []
    for q, i in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():  # gathered rows are not kept
            part = checkpoint(_block, q, keys, values, i, scales, softcap, use_reentrant=False)
        else:
            part = _block(q, keys, values, i, scales, softcap)
        parts.append(part)
    out, logsumexp, weights = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return Read(out, logsumexp, index, weights)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """Entries of a cache `(B, Hkv, N, D)` at `index` `(B, H, T, k)`: `(B, H, T, k, D)`. Where the
    index is -1 stands entry 0."""
    batch, heads, count, width = rows.shape
    group = index.shape[1] // heads
    first = torch.arange(batch * heads, device=rows.device) * count
    first = first.view(batch, heads).repeat_interleave(group, 1)
    flat = (index.clamp_min(0) + first[:, :, None, None]).flatten()
    return rows.reshape(-1, width).index_select(0, flat).view(*index.shape, width)


def _block(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, scales: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    wide = scales.dtype
    rows = gather(keys, index).to(wide)
    scores = (rows @ query[..., None].to(wide)).squeeze(-1) * scales[:, None, None]
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    there = index >= 0
    scores = scores.masked_fill(~there, _HIDDEN)
    weights = scores.softmax(-1) * there
    total = scores.logsumexp(-1).masked_fill(~there.any(-1), -math.inf)
    out = (weights[..., None, :] @ gather(values, index).to(wide)).squeeze(-2)
    return out, total, weights


def _search_chunked(
    query: Tensor, keys: Tensor, valid: Tensor, top_k: int, similarity: str
) -> tuple[Tensor, Tensor]:
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
    """The best of all entries, chunk by chunk, for queries `(B, Hkv, M, D)`: unit vectors for
    `"cosine"`, doubled for `"l2"`."""
    count = keys.shape[2]
    size = _SCORES_AT_ONCE // max(1, math.prod(grouped.shape[:3]))
    size = min(max(1, size), _ENTRIES_AT_ONCE)
    best = grouped.new_empty(*grouped.shape[:3], 0)
    index = torch.empty(best.shape, dtype=torch.long, device=keys.device)
    for start in range(0, count, size):
        part = keys[:, :, start : start + size].to(grouped.dtype)
        if similarity == "cosine":
            part = normalise(part)
        scores = grouped @ part.transpose(-1, -2)  # from here in place: it is large
        if similarity == "l2":
            scores -= part.square().sum(-1)[:, :, None]
        scores.masked_fill_(~valid[:, None, None, start : start + size], -math.inf)
        values, places = first_largest(scores, top_k)
        both = torch.cat([best, values], -1)
        order = both.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        index = torch.cat([index, places + start], -1).gather(-1, order)
        best = both.gather(-1, order)
    return best, index


def first_largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last dimension, descending; of equal ones those that come first.

    `topk` leaves open which of equal ones it takes. A query of zero (some models embed padding as
    zero) is equally similar to everything, and which entries it gets must not depend on how text
    is fed.
    """
    total = scores.shape[-1]
    count = min(count, total)
    top = scores.topk(min(count + 1, total), -1)
    places = top.indices
    if count < total:
        last = top.values[..., count - 1]
        tied = (last == top.values[..., count]) & (last > -math.inf)
        places = places[..., :count]
        if bool(tied.any()):
            order = scores[tied].sort(dim=-1, descending=True, stable=True).indices
            places = places.clone()
            places[tied] = order[..., :count]
    places = places.sort(-1).values
    ordered = scores.gather(-1, places).sort(dim=-1, descending=True, stable=True)
    return ordered.values, places.gather(-1, ordered.indices)


def _search_naive(
    query: Tensor, keys: Tensor, valid: Tensor, top_k: int, similarity: str
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    group, count = heads // keys.shape[1], keys.shape[2]
    shape = (batch, heads, length, min(top_k, count))
    best = query.new_full(shape, -math.inf)
    index = torch.full(shape, -1, dtype=torch.long, device=query.device)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                found = []
                for n in range(count):
                    q, k = query[b, h, t], keys[b, h // group, n].to(query.dtype)
                    score = float(q @ k)
                    if similarity == "cosine":
                        score /= max(float(q.norm()) * float(k.norm()), 1e-12)
                    elif similarity == "l2":
                        score = 2 * score - float(k @ k)
                    if bool(valid[b, n]):
                        found.append((-score, n))
                for place, (score, n) in enumerate(sorted(found)[:top_k]):
                    best[b, h, t, place], index[b, h, t, place] = -score, n
    return best, index


def _attend_naive(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, scales: Tensor, cap: float | None
) -> Read:
    batch, heads, length, top = index.shape
    group, wide = heads // keys.shape[1], scales.dtype
    outs, totals, weights = [], [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                chosen = [n for n in index[b, h, t].tolist() if n >= 0]
                own = torch.zeros(top, dtype=wide, device=query.device)
                out = torch.zeros(values.shape[-1], dtype=wide, device=query.device)
                total = torch.full((), -math.inf, dtype=wide, device=query.device)
                if chosen:
                    rows = keys[b, h // group, chosen].to(wide)
                    scores = rows @ query[b, h, t].to(wide) * scales[h]
                    if cap is not None:
                        scores = cap * torch.tanh(scores / cap)
                    total = scores.exp().sum().log()
                    part = (scores - total).exp()
                    out = part @ values[b, h // group, chosen].to(wide)
                    there = (index[b, h, t] >= 0).nonzero().squeeze(1)
                    own = own.index_put((there,), part)
                outs.append(out)
                totals.append(total)
                weights.append(own)
    shape = (batch, heads, length)
    return Read(
        torch.stack(outs).view(*shape, -1), torch.stack(totals).view(shape), index,
        torch.stack(weights).view(*shape, top),
    )  # fmt: skip
