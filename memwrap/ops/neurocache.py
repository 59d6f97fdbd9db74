"""Neurocache: retrieved compressed states and the attention to them (Safaya and Yuret 2024).

Shapes: B batch, T queries, M columns that retrieve, k hits, n neighbours of a hit, N = k n, d width
of compressed states, C entries, w columns of context, h query heads, g KV heads, e head width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memwrap.ops import current_backend

Layout = Literal["heads", "published"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_GATHERED_AT_ONCE = 2**25
_HIDDEN = -1e30


def context(
    queries: Tensor, keys: Tensor, valid: Tensor, width: int, *, clamp: bool = False
) -> tuple[Tensor, Tensor]:
    """Which columns hold a query's last tokens, itself among them.

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
    there = place >= 0
    if clamp:
        there = torch.ones_like(there)
    size = int(keys.max()) + 1 if keys.numel() else 1
    table = torch.zeros(keys.shape[0], size + 1, dtype=torch.long, device=keys.device)
    column = torch.arange(keys.shape[1], device=keys.device).expand_as(keys)
    table = table.scatter(1, torch.where(valid, keys, size), column)
    column = table.gather(1, place.clamp(0, size - 1).flatten(1)).view(place.shape)
    return column, there


def neighbours(number: Tensor, size: int) -> Tensor:
    """Each hit `(..., k)` and what stands around it in time: `(..., k * n)`, from n / 2 - 1 before
    it to n / 2 behind it; a hit's neighbours stand together."""
    first = 0 if size == 1 else 1 - size // 2
    offsets = torch.arange(first, first + size, device=number.device)
    return (number[..., None] + offsets).flatten(-2)


@torch.no_grad()
def search_buckets(query: Tensor, keys: Tensor, top_k: int, similarity: str) -> Tensor:
    """The published search, `(B, M, k)`: the best entry of every bucket (entries of one residue
    modulo the number of buckets), then the best buckets. Entries that sum to 0 count as empty.

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
    there: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    layout: str = "heads",
) -> Tensor:
    """Every query attends to the states that its last w tokens retrieved.

    Args:
        query: `(B, T, h, e)`, scaled.
        states: `(B, M, N, d)`, retrieved by M columns.
        valid: `(B, M, N)` bool; others take no part.
        column, there: `(B, T, w)`, a query's columns among the M, and which exist.
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
    if current_backend() == "naive":
        return _naive(query, states, valid, column, there, key_weight, value_weight, layout)
    batch, length, heads, _ = query.shape
    groups = key_weight.shape[0]
    grouped = query.unflatten(2, (groups, heads // groups))
    if layout == "heads":  # W_k goes to the query, W_v behind the sum: only states are gathered
        grouped = torch.einsum("btgre,ged->btgrd", grouped, key_weight)
        keys = values = states[:, :, None]
        mask = valid[:, :, None]
    else:
        keys, values = (
            torch.einsum("bmnd,ged->bmnge", states, w).reshape(
                *states.shape[:2], groups, states.shape[2], -1
            )
            for w in (key_weight, value_weight)
        )
        mask = valid.repeat_interleave(groups, 2).unflatten(2, (groups, -1))
    per_query = batch * column.shape[2] * keys[0, 0].numel() * 2
    size = max(1, _GATHERED_AT_ONCE // max(1, per_query))
    blocks = list(
        zip(grouped.split(size, 1), column.split(size, 1), there.split(size, 1), strict=True)
    )
    parts = []
    for block in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():  # gathered states are not kept
            part = checkpoint(_block, *block, keys, values, mask, use_reentrant=False)
        else:
            part = _block(*block, keys, values, mask)
        parts.append(part)
    out = torch.cat(parts, 1)
    if layout == "heads":
        out = torch.einsum("btgrd,ged->btgre", out, value_weight)
    return out.reshape(batch, length, heads, -1)


def _block(
    query: Tensor, column: Tensor, there: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """`(B, t, g, r, D)` of queries `(B, t, g, r, D)` over `(B, M, g or 1, N, D)`."""
    same = keys is values
    rows = _columns(keys, column)
    visible = _columns(mask, column, there)[:, :, :, None]
    scores = (query @ rows.transpose(-1, -2)).masked_fill(~visible, _HIDDEN)
    weights = scores.softmax(-1) * visible
    return weights @ (rows if same else _columns(values, column))


def _columns(x: Tensor, column: Tensor, there: Tensor | None = None) -> Tensor:
    """What queries' columns hold: `(B, M, g, N, ...)` to `(B, t, g, w N, ...)`."""
    batch, count = x.shape[:2]
    first = torch.arange(batch, device=x.device)[:, None, None] * count
    rows = x.flatten(0, 1).index_select(0, (column + first).flatten())
    rows = rows.view(*column.shape, *x.shape[2:])
    if there is not None:
        rows = rows & there[..., None, None]
    return rows.transpose(2, 3).flatten(3, 4)


def _naive(
    query: Tensor, states: Tensor, valid: Tensor, column: Tensor, there: Tensor,
    key_weight: Tensor, value_weight: Tensor, layout: str,
) -> Tensor:  # fmt: skip
    batch, length, heads, width = query.shape
    groups, count = key_weight.shape[0], states.shape[2]
    out = []
    for b in range(batch):
        for t in range(length):
            for head in range(heads):
                own = head // (heads // groups)
                keys, values = [], []
                for place in range(column.shape[2]):
                    source = int(column[b, t, place])
                    for chunk in range(count):
                        state, weight = chunk, own
                        if layout == "published":
                            state, weight = divmod(own * count + chunk, groups)
                        if bool(there[b, t, place]) and bool(valid[b, source, state]):
                            row = states[b, source, state]
                            keys.append(key_weight[weight] @ row)
                            values.append(value_weight[weight] @ row)
                if not keys:
                    out.append(query.new_zeros(width))
                    continue
                weights = (torch.stack(keys) @ query[b, t, head]).softmax(0)
                out.append(weights @ torch.stack(values))
    return torch.stack(out).view(batch, length, heads, -1)
