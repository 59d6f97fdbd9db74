"""Block memory of InfLLM: who is a representative, what a unit is worth, which are selected.

Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context
Memory" (2024), section 3. Shapes: B batch, H query heads, Hkv key-value heads (query head h uses
`h // (H / Hkv)`), T tokens, S selections, N units of a block of b tokens, D channels of a head.
Nothing here has a gradient: what is selected is a choice.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend


def settled(tokens: Tensor, window: int, sinks: int, block: int) -> tuple[Tensor, Tensor]:
    """What of a row's first `tokens` `(B,)` tokens is a sink and what a unit.

    The first tokens that leave the window become sinks; each block of tokens behind them becomes
    a unit once all of it has left.

    Returns:
        Sinks and units, each `(B,)`.
    """
    gone = tokens - window
    return gone.clamp(0, sinks), ((gone - sinks) // block).clamp_min(0)


def gather_queries(
    query: Tensor, starts: Tensor, valid: Tensor, total: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries with which units are selected: at each start the mean of the queries since the
    last one, its own included.

    Args:
        query: `(B, H, T, D)`, plain.
        starts: `(B, T)` bool, tokens at which units are selected (valid ones).
        valid: `(B, T)` bool.
        total: `(B, H, D)`, sum of the queries since the last start before these tokens.
        count: `(B,)`, how many they are.

    Returns:
        The means `(B, S, H, D)`, those of a row's starts first (S is the largest number of
        starts), and the new `total` and `count`.
    """
    function = _gather_naive if current_backend() == "naive" else _gather_chunked
    return function(query.detach().to(total.dtype), starts, valid, total, count)


def _gather_naive(
    query: Tensor, starts: Tensor, valid: Tensor, total: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = query.shape
    means = query.new_zeros(batch, int(starts.sum(1).max()) if length else 0, heads, width)
    total, count = total.clone(), count.clone()
    for row in range(batch):
        made = 0
        for t in range(length):
            if valid[row, t]:
                total[row] += query[row, :, t]
                count[row] += 1
            if starts[row, t]:
                means[row, made] = total[row] / count[row]
                made += 1
                total[row], count[row] = 0, 0
    return means, total, count


def _gather_chunked(
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
    there = torch.arange(groups - 1, device=query.device) < made[:, None]
    return means * there[..., None, None], sums[rows, made], counts[rows, made]


def unit_scores(query: Tensor, rep: Tensor) -> Tensor:
    """What units are worth to selecting queries: inner products summed over the heads.

    Args:
        query: `(B, S, H, D)`, rotated to the units' distance.
        rep: `(B, N, H, D)`, one representative vector a query head.

    Returns:
        `(B, S, N)`, in float32 or float64.
    """
    wide = torch.promote_types(accumulation_dtype(query), rep.dtype)
    query, rep = query.to(wide), rep.to(wide)
    if current_backend() == "naive":
        return (query[:, :, None] * rep[:, None]).sum((-2, -1))
    return query.flatten(2) @ rep.flatten(2).transpose(1, 2)


def select(scores: Tensor, units: Tensor, top_k: int) -> Tensor:
    """The `top_k` units of the largest scores; of equal ones the most recent.

    Args:
        scores: `(B, S, N)`.
        units: `(B,)`, units that a row has; with `top_k` or fewer all are taken.
        top_k: most units.

    Returns:
        `(B, S, N)` bool.
    """
    if current_backend() == "naive":
        return _select_naive(scores, units, top_k)
    number = scores.shape[2]
    there = torch.arange(number, device=scores.device) < units[:, None, None]
    scores = scores.masked_fill(~there, float("-inf"))
    best = scores.flip(2).argsort(dim=2, descending=True, stable=True)[..., :top_k]
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(2, best.neg() + (number - 1), True) & there


def _select_naive(scores: Tensor, units: Tensor, top_k: int) -> Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(units.tolist()):
        for index in range(scores.shape[1]):
            values = scores[row, index, :count].tolist()
            best = sorted(range(count), key=lambda n: (-values[n], -n))[:top_k]
            chosen[row, index, best] = True
    return chosen


def representatives(keys: Tensor, scores: Tensor, count: int) -> Tensor:
    """One vector a unit and query head: the mean of the raw keys of its `count` tokens with the
    largest scores; of equal ones the first.

    Args:
        keys: `(B, N, Hkv, b, D)`.
        scores: `(B, N, H, b)`.
        count: tokens; at most b.

    Returns:
        `(B, N, H, D)` in the keys' dtype.
    """
    keys = keys.detach()
    groups = scores.shape[2] // keys.shape[2]
    if current_backend() == "naive":
        return _representatives_naive(keys, scores, count)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    wide = keys.repeat_interleave(groups, 2)
    picked = wide.gather(3, best[..., None].expand(*best.shape, wide.shape[-1]))
    return picked.to(accumulation_dtype(keys)).mean(3).to(keys.dtype)


def _representatives_naive(keys: Tensor, scores: Tensor, count: int) -> Tensor:
    groups = scores.shape[2] // keys.shape[2]
    result = keys.new_zeros(*scores.shape[:3], keys.shape[-1])
    for row, unit, head in itertools.product(*(range(n) for n in scores.shape[:3])):
        values = scores[row, unit, head].tolist()
        best = sorted(range(len(values)), key=lambda n: -values[n])[:count]
        result[row, unit, head] = keys[row, unit, head // groups, best].mean(0)
    return result


def received_products(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """The paper's score of a token (eq. 1, times l_L): the sum of its key's inner products with
    the queries that see it.

    Args:
        query: `(B, H, T, D)`, rotated. key: `(B, Hkv, K, D)`, rotated.
        visible: `(B, T, K)` bool.

    Returns:
        `(B, H, K)`.
    """
    query, key = query.detach(), key.detach()
    groups = query.shape[1] // key.shape[1]
    wide = accumulation_dtype(query)
    if current_backend() == "naive":
        result = query.new_zeros(*query.shape[:2], key.shape[2], dtype=wide)
        for t in range(query.shape[2]):
            for head in range(query.shape[1]):
                products = (key[:, head // groups].to(wide) * query[:, head, t, None].to(wide)).sum(
                    -1
                )
                result[:, head] += products * visible[:, t]
        return result
    products = query.to(wide) @ key.to(wide).repeat_interleave(groups, 1).transpose(2, 3)
    return (products * visible[:, None]).sum(2)
