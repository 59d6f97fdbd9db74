"""The plan of a call: which tokens are cut into which segments, and what opens and closes when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memwrap.memories.base import MemoryConfig


def segment_lengths(total: int, segment_size: int, alignment: str = "left") -> list[int]:
    """Lengths of the segments that `total` tokens are cut into.

    "left": the last one is the short one; "right": the first one; "center": nearly equal
    lengths `ceil(total / ceil(total / segment_size))`.

    Raises:
        ValueError: for another alignment.
    """
    if alignment not in ("left", "right", "center"):
        raise ValueError(f"`alignment` is {alignment!r}; allowed: 'left', 'right', 'center'.")
    if total <= 0:
        return []
    count = -(-total // segment_size)
    size = -(-total // count) if alignment == "center" else segment_size
    lengths = [size] * (total // size)
    rest = total - sum(lengths)
    if rest:
        lengths = [rest, *lengths] if alignment == "right" else [*lengths, rest]
    return lengths


@dataclass
class Step:
    """One pass of the backbone: which columns each row reads, and what opens and closes.

    Attributes:
        columns: `(B, N)` columns of the call, -1 where a row reads nothing.
        offsets: `(B, N)` places inside the segment.
        ends: `(B,)` length of the segment so far, after the step.
        opens, closes: `(B,)` bool.
        last: `(B,)` bool, the row reads nothing after this step.
        uniform: every row reads the same contiguous columns.
    """

    columns: Tensor
    offsets: Tensor
    ends: Tensor
    opens: Tensor
    closes: Tensor
    last: Tensor

    @property
    def uniform(self) -> bool:
        same = (self.columns >= 0).all() and (self.columns == self.columns[:1]).all()
        return self.columns.shape[1] > 0 and bool(same)


def _row_pieces(
    start: int,
    length: int,
    fill: int,
    config: MemoryConfig,
    hold_open: bool,
    drawn: dict[int, list[int] | None] | None = None,
) -> Iterator[tuple[int, int, int, bool]]:
    """`(first column, tokens, offset in the segment, closes)` of one row.

    `drawn` takes up what training drew by number of tokens, so that rows of one length are cut
    alike.
    """
    size = config.segment_size
    if hold_open and fill >= size:
        if length:
            yield start, length, fill, False
        return
    if fill and length:
        taken = max(0, min(length, size - fill))  # none where a held segment is over-full
        start, length = start + taken, length - taken
        closes = fill + taken >= size and not (hold_open and length == 0)
        yield start - taken, taken, fill, closes
    own = None
    if drawn is not None:
        own = drawn[length] = drawn.get(length) or config.draw_lengths(length)
    lengths = own or segment_lengths(length, size, config.alignment)
    for index, taken in enumerate(lengths):
        full = taken == size or (own is not None and length % size == 0)
        closes = index < len(lengths) - 1 or (full and not hold_open)
        yield start, taken, 0, closes
        start += taken


def plan(
    starts: list[int],
    lengths: list[int],
    fill: Tensor,
    config: MemoryConfig,
    hold_open: bool,
    training: bool = False,
) -> list[Step]:
    """Cut a call into steps.

    Args:
        starts: first real column of each row.
        lengths: real tokens of each row.
        fill: `(B,)` tokens in the rows' open segments.
        config: gives segment size and alignment.
        hold_open: the last segment of the call stays open, however long it grows.
        training: segment lengths may be drawn (`MemoryConfig.draw_lengths`).
    """
    drawn: dict[int, list[int] | None] | None = {} if training else None
    rows = [
        list(_row_pieces(s, n, int(f), config, hold_open, drawn))
        for s, n, f in zip(starts, lengths, fill.tolist(), strict=True)
    ]
    steps = []
    ends = fill.clone()
    for index in range(max((len(r) for r in rows), default=0)):
        pieces = [r[index] if index < len(r) else None for r in rows]
        width = max(p[1] for p in pieces if p)
        columns = torch.full((len(rows), width), -1)
        offsets = torch.zeros(len(rows), width, dtype=torch.long)
        opens = torch.zeros(len(rows), dtype=torch.bool)
        closes = torch.zeros(len(rows), dtype=torch.bool)
        for row, piece in enumerate(pieces):
            if piece is None:
                continue
            start, taken, offset, closing = piece
            columns[row, :taken] = torch.arange(start, start + taken)
            offsets[row, :taken] = torch.arange(offset, offset + taken)
            ends[row] = offset + taken
            opens[row], closes[row] = offset == 0, closing
        last = torch.tensor([len(r) == index + 1 for r in rows])
        steps.append(Step(columns, offsets, ends.clone(), opens, closes, last))
        ends = ends.masked_fill(closes, 0)
    return steps


def plan_columns(real: Tensor, config: MemoryConfig, hold_open: bool) -> list[Step]:
    """Cut by columns, every row alike; padding takes up positions (`count_padding`)."""
    batch, total = real.shape
    steps = plan([0] * batch, [total] * batch, torch.zeros(batch).long(), config, hold_open)
    return [
        replace(s, columns=s.columns.masked_fill(~real.gather(1, s.columns), -1)) for s in steps
    ]


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
