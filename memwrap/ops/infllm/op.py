"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.infllm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend
from memwrap.ops.infllm.chunked import (
    gather_chunked,
    received_chunked,
    representatives_chunked,
    select_chunked,
)
from memwrap.ops.infllm.naive import (
    gather_naive,
    received_naive,
    representatives_naive,
    select_naive,
)


@dataclass
class Selection:
    """The units that the queries of a step see.

    Attributes:
        marks: `(B, 1 + S, N)` bool; the first are those that were selected before the step.
        index: `(B, T)`, the selection under which each query stands.
    """

    marks: Tensor
    index: Tensor


def settled(tokens: Tensor, window: int, sinks: int, block: int) -> tuple[Tensor, Tensor]:
    """Tell what of a row's first `tokens` `(B,)` tokens is a sink and what a unit.

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
    """Compute the queries with which units are selected: at each start the mean of the queries
    since the last one, its own included.

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
    function = gather_naive if current_backend() == "naive" else gather_chunked
    return function(query.detach().to(total.dtype), starts, valid, total, count)


def unit_scores(query: Tensor, rep: Tensor) -> Tensor:
    """Score units for selecting queries: inner products summed over the heads.

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
    """Choose the `top_k` units of the largest scores; of equal ones the most recent.

    Args:
        scores: `(B, S, N)`.
        units: `(B,)`, units that a row has; with `top_k` or fewer all are taken.
        top_k: most units.

    Returns:
        `(B, S, N)` bool.
    """
    function = select_naive if current_backend() == "naive" else select_chunked
    return function(scores, units, top_k)


def representatives(keys: Tensor, scores: Tensor, count: int) -> Tensor:
    """Compute one vector a unit and query head: the mean of the raw keys of its `count` tokens with
    the largest scores; of equal ones the first.

    Args:
        keys: `(B, N, Hkv, b, D)`.
        scores: `(B, N, H, b)`.
        count: tokens; at most b.

    Returns:
        `(B, N, H, D)` in the keys' dtype.
    """
    function = representatives_naive if current_backend() == "naive" else representatives_chunked
    return function(keys.detach(), scores, count)


def received_products(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Compute the paper's score of a token (eq. 1, times l_L): the sum of its key's inner products
    with the queries that see it.

    Args:
        query: `(B, H, T, D)`, rotated. key: `(B, Hkv, K, D)`, rotated.
        visible: `(B, T, K)` bool.

    Returns:
        `(B, H, K)`.
    """
    function = received_naive if current_backend() == "naive" else received_chunked
    return function(query.detach(), key.detach(), visible)
