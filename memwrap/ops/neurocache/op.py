"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.neurocache`."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from memwrap.ops import current_backend
from memwrap.ops.neurocache.chunked import attend_chunked
from memwrap.ops.neurocache.naive import attend_naive

Layout = Literal["heads", "published"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def context(
    queries: Tensor, keys: Tensor, valid: Tensor, width: int, *, clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """Tell which columns hold a query's last tokens, itself among them.

    Args:
        queries, keys: places `(B, T)` and `(B, K)` in the segment.
        valid: `(B, K)` bool.
        width: w, tokens of context.
        clamp: before the segment's first token stands that token again, as published.

    Returns:
        Columns `(B, T, w)`, oldest first, and which of them are there.
    """
    back = torch.arange(width - 1, -1, -1, device=queries.device)
    place = queries[..., None] - back
    present = place >= 0
    if clamp:
        present = torch.ones_like(present)
    size = int(keys.max()) + 1 if keys.numel() else 1
    table = torch.zeros(keys.shape[0], size + 1, dtype=torch.long, device=keys.device)
    column = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    table = table.scatter(1, torch.where(valid, keys, size), column)
    column = table.gather(1, place.clamp(0, size - 1).flatten(1)).view(place.shape)
    return column, present


def neighbours(number: Tensor, size: int) -> Tensor:
    """Add to each hit `(..., k)` what stands around it in time: `(..., k * n)`, from n / 2 - 1
    before it to n / 2 behind it; a hit's neighbours stand together."""
    first = 0 if size == 1 else 1 - size // 2
    offsets = torch.arange(first, first + size, device=number.device)
    return (number[..., None] + offsets).flatten(-2)


@torch.no_grad()
def search_buckets(query: Tensor, keys: Tensor, top_k: int, similarity: str) -> Tensor:
    """Search as published, `(B, M, k)`: the best entry of every bucket (entries of one
    residue modulo the number of buckets), then the best buckets. Entries that sum to 0 count as
    empty.

    Args:
        query: `(B, M, d)`.
        keys: `(B, C, d)`, C a multiple of `min(max(top_k, 512), C)`.
        top_k: hits.
        similarity: `"l2"` or `"dot"`.
    """
    scores = query @ keys.transpose(-1, -2)
    if similarity == "l2":
        scores = 2 * scores - keys.square().sum(-1)[:, None]
    scores = scores + (keys.sum(-1) == 0)[:, None] * -1e8
    buckets = min(max(top_k, 512), keys.shape[1])
    best = scores.unflatten(-1, (-1, buckets)).max(2)
    entry = best.indices * buckets + torch.arange(buckets, device=keys.device)
    if buckets == top_k:
        return entry
    return entry.gather(-1, best.values.topk(top_k, -1).indices)


def attend(
    query: Tensor,
    states: Tensor,
    valid: Tensor,
    column: Tensor,
    present: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    layout: str = "heads",
) -> Tensor:
    """Let every query attend to the states that its last w tokens retrieved.

    Args:
        query: `(B, T, h, e)`, scaled.
        states: `(B, M, N, d)`, retrieved by M columns.
        valid: `(B, M, N)` bool; others take no part.
        column, present: `(B, T, w)`, a query's columns among the M, and which exist.
        key_weight, value_weight: `(g, e, d)`.
        layout: `"heads"`, each KV head projects all states; `"published"`, KV head a gets the
            projections number `a N` to `a N + N - 1` in the order (state, head), as a plain reshape
            of the public code has it.

    Returns:
        `(B, T, h, e)`; 0 for a query that retrieved nothing.

    Raises:
        ValueError: for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}; allowed: {', '.join(LAYOUTS)}.")
    function = attend_naive if current_backend() == "naive" else attend_chunked
    return function(query, states, valid, column, present, key_weight, value_weight, layout)
