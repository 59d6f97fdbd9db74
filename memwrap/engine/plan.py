"""The plan of a call: which tokens are cut into which segments, and what opens and closes when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.engine.inputs import Inputs
from memwrap.memories.config import MemoryConfig


def segment_lengths(total: int, segment_size: int, alignment: str = "left") -> list[int]:
    """Compute the lengths of the segments that `total` tokens are cut into.

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


def draw_lengths(config: MemoryConfig, total: int) -> list[int] | None:
    """Draw the segment lengths of `total` tokens in training, with torch's generator.

    Each window of `bptt_segments` segments is cut anew into as many. For two this is the rule of
    AutoCompressors (Chevalier et al. 2023): one cut, uniform between the bounds. As many tokens as
    fit whole segments are drawn, the rest stays last.

    Returns:
        None where they are cut as in evaluation.
    """
    whole, rest = divmod(total, config.segment_size)
    if not config.length_spread or whole < 2:
        return None
    window = config.bptt_segments or whole
    lengths: list[int] = []
    for first in range(0, whole, window):
        lengths += _draw(config, min(window, whole - first))
    return [*lengths, rest] if rest else lengths


def _draw(config: MemoryConfig, count: int) -> list[int]:
    """Draw `count` lengths with the mean `segment_size`: what one of a pair has more the other has
    less, in any order."""
    size = config.segment_size
    most = min(config.longest_segment - size, size - min(2, size))
    more = torch.randint(-most, most + 1, (count // 2,)).tolist()
    lengths = [size + m for m in more] + [size - m for m in more] + [size] * (count % 2)
    return [lengths[i] for i in torch.randperm(count).tolist()]


@dataclass
class Step:
    """One pass of the backbone: which columns each row reads, and what opens and closes.

    Attributes:
        columns: `(B, N)` columns of the call, -1 where a text reads nothing.
        offsets: `(B, N)` places inside the segment.
        ends: `(B,)` length of the segment so far, after the step.
        opens, closes: `(B,)` bool.
        last: `(B,)` bool, the text has nothing to read after this step.
        rows: `(B,)` rows of the call that the texts stand in.
    """

    columns: Tensor
    offsets: Tensor
    ends: Tensor
    opens: Tensor
    closes: Tensor
    last: Tensor
    rows: Tensor

    def take(self, values: Tensor, empty: int | None = None) -> Tensor:
        """Take `values` `(rows, T, ...)` of the call at the columns, `(B, N, ...)`, with `empty`
        (None: anything) where a text reads nothing."""
        columns = self.columns
        same = columns.numel() and (columns >= 0).all() and (columns == columns[:1]).all()
        if same and torch.equal(self.rows, torch.arange(len(values))):
            first = int(columns[0, 0])
            return values[:, first : first + columns.shape[1]]
        rows, index = self.rows.to(values.device), columns.to(values.device)
        taken = values[rows[:, None], index.clamp_min(0)]
        return taken if empty is None else taken.masked_fill(index < 0, empty)


def _row_pieces(
    start: int,
    length: int,
    fill: int,
    config: MemoryConfig,
    hold_open: bool,
    drawn: dict[int, list[int] | None] | None = None,
) -> Iterator[tuple[int, int, int, bool]]:
    """Cut one row: yield `(first column, tokens, offset in the segment, closes)`.

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
    chosen = None
    if drawn is not None:
        chosen = drawn[length] = drawn.get(length) or draw_lengths(config, length)
    lengths = chosen or segment_lengths(length, size, config.alignment)
    for index, taken in enumerate(lengths):
        full = taken == size or (chosen is not None and length % size == 0)
        closes = index < len(lengths) - 1 or (full and not hold_open)
        yield start, taken, 0, closes
        start += taken


def plan(
    inputs: Inputs, fill: Tensor, config: MemoryConfig, hold_open: bool, training: bool = False
) -> list[Step]:
    """Cut a call into steps.

    Args:
        inputs: of B texts. With `count_padding` they are cut by columns, every row alike, and
            padding takes up positions.
        fill: `(B,)` tokens in the texts' open segments.
        config: gives segment size and alignment.
        hold_open: the last segment of the call stays open, however long it grows.
        training: segment lengths may be drawn (`draw_lengths`).
    """
    starts, lengths = inputs.starts, inputs.lengths
    if config.count_padding:
        starts, lengths = torch.zeros_like(starts), torch.full_like(starts, inputs.shape[1])
    drawn: dict[int, list[int] | None] | None = {} if training else None
    texts = [
        list(_row_pieces(s, n, f, config, hold_open, drawn))
        for s, n, f in zip(starts.tolist(), lengths.tolist(), fill.tolist(), strict=True)
    ]
    rows = torch.arange(len(texts)) if inputs.rows is None else inputs.rows
    steps = []
    ends = fill.clone()
    for index in range(max(map(len, texts), default=0)):
        pieces = [text[index] if index < len(text) else None for text in texts]
        width = max(p[1] for p in pieces if p)
        columns = torch.full((len(texts), width), -1)
        offsets = torch.zeros_like(columns)
        opens = torch.zeros(len(texts), dtype=torch.bool)
        closes = torch.zeros_like(opens)
        for row, piece in enumerate(pieces):
            if piece is None:
                continue
            start, taken, offset, closing = piece
            columns[row, :taken] = torch.arange(start, start + taken)
            offsets[row, :taken] = torch.arange(offset, offset + taken)
            ends[row] = offset + taken
            opens[row], closes[row] = offset == 0, closing
        if config.count_padding:
            columns = columns.masked_fill(~inputs.real.gather(1, columns), -1)
        last = torch.tensor([len(text) == index + 1 for text in texts])
        steps.append(Step(columns, offsets, ends.clone(), opens, closes, last, rows))
        ends = ends.masked_fill(closes, 0)
    return steps
