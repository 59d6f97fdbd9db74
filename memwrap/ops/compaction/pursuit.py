"""Orthogonal matching pursuit on the mass: keys one after the other, for what is still missing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memwrap.ops.compaction.matching import Matching
from memwrap.ops.compaction.solvers import SMALLEST

ROUNDS = 3  # in which weak keys are replaced


def pursue(
    matching: Matching,
    count: int,
    valid: Tensor,
    correlate: Callable[[list[int], Tensor], Tensor],
    solve: Callable[[list[int]], Tensor],
) -> tuple[list[int], Tensor]:
    """Choose keys of one head.

    Args:
        matching: how.
        count: keys wanted.
        valid: `(T,)` bool, which there are.
        correlate: the correlation `(T,)` of all keys with what chosen keys and their weights leave
            of the mass.
        solve: the weights of chosen keys.

    Returns:
        The keys in the order of choice (fewer than `count` where they run out), and their weights.
    """
    free = valid.clone()
    chosen: list[int] = []
    weights: Tensor | None = None
    current = valid.new_zeros(0, dtype=torch.float64)
    step, rounds = 0, 0
    while True:
        if len(chosen) < count:
            choices, every = matching.pace(len(chosen))
            number = min(choices, int(free.sum()), count - len(chosen))
            if number == 0:
                break
            rank = correlate(chosen, current)
            rank = (rank.abs() if matching.absolute else rank).masked_fill(~free, -math.inf)
            new = rank.argsort(descending=True, stable=True)[:number]
            free[new] = False
            chosen = chosen + new.tolist()
            if weights is None or step % every == 0:
                weights = solve(chosen)
            else:
                lowest = weights.new_full((number,), max(matching.lower, SMALLEST))
                weights = torch.cat([weights, lowest])
            current, step = weights, step + 1
            continue
        if matching.drop_below is None or rounds == ROUNDS:
            break
        rounds += 1
        current = solve(chosen)
        stays = (current.log() >= matching.drop_below).tolist()
        if all(stays):
            break
        chosen = [key for key, good in zip(chosen, stays, strict=True) if good]
        current, weights, step = solve(chosen), None, step + 1
    return chosen, current
