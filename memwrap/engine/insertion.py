"""Tokens that a memory inserts among a segment's own: where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.engine.plan import Step


@dataclass
class Inserted:
    """Where a step's tokens and the tokens inserted among them stand, N tokens, M inserted.

    Attributes:
        token_places, places: `(B, N)` and `(B, M)`, the order in the segment.
        followed: `(B, M)`, the offset of the token that each inserted one follows.
        valid: `(B, M)` bool.
        order: `(B, N + M)`, which of `[tokens | inserted]` stands in each column: those that are
            there first, by place.
        tokens: `(B, N)`, the column of each token.
        ends: `(B, N)` bool, tokens after which a block's inserted token follows; after: `(B, N)`,
            its column there and the token's own elsewhere.
    """

    token_places: Tensor
    places: Tensor
    followed: Tensor
    valid: Tensor
    order: Tensor
    tokens: Tensor
    ends: Tensor
    after: Tensor


def block_ends(step: Step, every: int, counted: bool = False) -> Tensor:
    """`(B, N)` bool: tokens that fill a block of `every`, counted from the segment's start."""
    there = torch.ones_like(step.columns, dtype=torch.bool) if counted else step.columns >= 0
    return there & ((step.offsets + 1) % every == 0)


def inserted_before(tokens: Tensor, every: int) -> Tensor:
    """Inserted tokens among the first `tokens` of a closed segment: one a block, full or not."""
    return (tokens + every - 1) // every


def insert(step: Step, every: int, counted: bool = False) -> Inserted | None:
    """One token after every `every` of a segment, and at its close after what is left.

    Args:
        step: the plan.
        every: tokens of a block.
        counted: padding fills blocks too (`count_padding`).

    Returns:
        None if the step has no place for one.
    """
    full = block_ends(step, every, counted)
    rest = step.closes & (step.ends % every != 0)
    count = int(full.sum(1).max()) if full.numel() else 0
    if not count and not bool(rest.any()):
        return None
    index = (~full).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    followed, valid = step.offsets.gather(1, index), full.gather(1, index)
    if bool(rest.any()):
        followed = torch.cat([followed, (step.ends - 1).clamp_min(0)[:, None]], 1)
        valid = torch.cat([valid, rest[:, None]], 1)
    places = followed + inserted_before(followed + 1, every)
    token_places = step.offsets + step.offsets // every
    there = torch.cat([step.columns >= 0, valid], 1)
    both = torch.cat([token_places, places], 1)
    order = both.masked_fill(~there, int(both.max()) + 1).argsort(dim=1, stable=True)
    column = order.argsort(1)
    tokens = column[:, : full.shape[1]]
    rank = full.shape[1] + (full.long().cumsum(1) - 1).clamp_min(0)
    after = torch.where(full, column.gather(1, rank), tokens)
    return Inserted(token_places, places, followed, valid, order, tokens, full, after)
