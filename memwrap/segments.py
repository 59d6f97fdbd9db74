"""The segment loop: what is cut where, what is read and written when, what is detached.

A call's tokens are cut into steps. In one step every row reads a piece of at most one segment:
`[prefix | tokens | suffix]`, the prefix where the row's segment opens, the suffix where it
closes. A step is a function of (tokens, parameters, state tensors), so that checkpointing a
whole segment is one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memwrap.backbones import Backbone, Places
from memwrap.backbones.attention import attention_modules
from memwrap.context import LayerContext, Local
from memwrap.memories.base import Memory, MemoryConfig
from memwrap.state import cache_of, tree_of
from memwrap.trees import Tree, tree_map, where_rows


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
    start: int, length: int, fill: int, config: MemoryConfig, hold_open: bool
) -> Iterator[tuple[int, int, int, bool]]:
    """`(first column, tokens, offset in the segment, closes)` of one row."""
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
    lengths = segment_lengths(length, size, config.alignment)
    for index, taken in enumerate(lengths):
        closes = index < len(lengths) - 1 or (taken == size and not hold_open)
        yield start, taken, 0, closes
        start += taken


def plan(
    starts: list[int], lengths: list[int], fill: Tensor, config: MemoryConfig, hold_open: bool
) -> list[Step]:
    """Cut a call into steps.

    Args:
        starts: first real column of each row.
        lengths: real tokens of each row.
        fill: `(B,)` tokens in the rows' open segments.
        config: gives segment size and alignment.
        hold_open: the last segment of the call stays open, however long it grows.
    """
    rows = [
        list(_row_pieces(s, n, int(f), config, hold_open))
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
class Outcome:
    """What a step gives.

    Attributes:
        hidden: the tokens' last hidden states `(B, N, D)`.
        states: the memories' trees after it.
        local: the open segments after it.
        auxiliary: the memories' own losses `(B,)`, means per token, or None.
    """

    hidden: Tensor
    states: dict[str, Tree]
    local: Local
    auxiliary: Tensor | None = None


class SegmentReader:
    """Runs steps: the backbone and its memories, without any state of its own."""

    def __init__(self, backbone: Backbone, memories: dict[str, Memory]) -> None:
        self.backbone = backbone
        self.memories = memories
        self.tokens = {n: m for n, m in memories.items() if "tokens" in m.config.places}
        self.layers = {n: m for n, m in memories.items() if "layer" in m.config.places}
        self.attending = {n: m for n, m in memories.items() if "attention" in m.config.places}
        self.num_prefix = sum(m.num_prefix for m in self.tokens.values())
        self.num_suffix = sum(m.num_suffix for m in self.tokens.values())

    def run(
        self, embeds: Tensor, step: Step, states: dict[str, Tree], local: Local, keep: bool
    ) -> Outcome:
        """Read one step.

        Args:
            embeds: `(B, N, D)` of the step's tokens (anything at empty places).
            step: the plan.
            states: the memories' trees.
            local: the open segments before the step.
            keep: whether the open segments are wanted after it.
        """
        blocks, valid, positions = self._blocks(embeds, step, states)
        x = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
        all_positions = torch.cat([local.positions, positions], 1)
        all_valid = torch.cat([local.valid, valid], 1)
        places = Places(positions, all_positions, valid, all_valid)
        context = self._context(step, states, local, places)
        if x.shape[1] == 0:  # a segment that closes without tokens or suffix
            self._close_cached(context)
            return Outcome(x, context.changed(step.closes), _nothing(local))
        cache = cache_of(local.tree) if keep or not local.empty else None
        plain = local.empty and bool(valid.all()) and self._contiguous(positions)
        hidden = self.backbone.run(
            x,
            positions,
            key_positions=None if plain else all_positions,
            key_valid=None if plain else all_valid,
            cache=cache,
            context=context if self.layers or self.attending else None,
        )
        self._check_met(context)
        first = self.num_prefix if bool(step.opens.any()) else 0
        tokens = hidden[:, first : first + step.columns.shape[1]]
        new = self._write(step, context.changed(step.closes), hidden)
        kept = _nothing(local)
        if keep and cache is not None:
            tree = tree_of(cache) | ({"hidden": context.hidden} if context.hidden else {})
            kept = _still_open(tree, all_positions, all_valid, step.closes)
        auxiliary = torch.stack(context.losses).sum(0) if context.losses else None
        return Outcome(tokens, new, kept, auxiliary)

    def _context(
        self, step: Step, states: dict[str, Tree], local: Local, places: Places
    ) -> LayerContext:
        return LayerContext(
            layered=self.layers,
            attending=self.attending,
            states=states,
            num_suffix=self.num_suffix,
            closing=bool(step.closes.any()),
            places=places,
            local=local,
            rotary=self.backbone.rotary,
        )

    def _close_cached(self, context: LayerContext) -> None:
        if self.attending and context.closing and not context.local.empty:
            for layer, module in enumerate(attention_modules(self.backbone.layers)):
                context.close_attention(layer, module)

    def _check_met(self, context: LayerContext) -> None:
        """Every layer must have met its memories: a model that drops keywords is refused."""
        name = type(self.backbone.model).__name__
        count = len(self.backbone.layers) if self.layers or self.attending else 0
        if self.layers and len(context.seen) != count:
            raise ValueError(
                f"{name} does not hand keyword arguments down to its decoder layers, which "
                "layer-level memories need; use a token-level one (rmt)."
            )
        if self.attending and len(context.attended) != count:
            raise ValueError(
                f"{name}'s attention no longer meets the memory: its attention implementation "
                f"was changed to {self.backbone.config._attn_implementation!r} after wrapping. "
                "Unwrap, change it, and wrap again."
            )

    def _blocks(
        self, embeds: Tensor, step: Step, states: dict[str, Tree]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The parts of a step's input, with validity `(B, N')` and positions `(B, N')`."""
        batch, real = embeds.shape[0], step.columns >= 0
        blocks, valid, positions = [embeds], [real], [step.offsets + self.num_prefix]
        if self.num_prefix and bool(step.opens.any()):
            parts = [m.prefix(states[n]) for n, m in self.tokens.items() if m.num_prefix]
            blocks.insert(0, torch.cat(parts, 1).to(embeds.dtype))
            valid.insert(0, step.opens[:, None].expand(-1, self.num_prefix))
            positions.insert(0, torch.arange(self.num_prefix).expand(batch, -1))
        if self.num_suffix and bool(step.closes.any()):
            parts = [m.suffix(states[n]) for n, m in self.tokens.items() if m.num_suffix]
            blocks.append(torch.cat(parts, 1).to(embeds.dtype))
            valid.append(step.closes[:, None].expand(-1, self.num_suffix))
            after = step.ends + self.num_prefix
            positions.append(after[:, None] + torch.arange(self.num_suffix))
        return blocks, torch.cat(valid, 1), torch.cat(positions, 1)

    @staticmethod
    def _contiguous(positions: Tensor) -> bool:
        return bool((positions == torch.arange(positions.shape[1])).all())

    def _write(self, step: Step, states: dict[str, Tree], hidden: Tensor) -> dict[str, Tree]:
        """The memories' trees after the suffix of the rows that closed was read."""
        if not bool(step.closes.any()):
            return states
        place = hidden.shape[1] - self.num_suffix
        for name, memory in self.tokens.items():
            new = memory.write(states[name], hidden[:, place : place + memory.num_suffix])
            place += memory.num_suffix
            every = bool(step.closes.all())
            states = {**states, name: new if every else where_rows(step.closes, new, states[name])}
        return states


def _nothing(local: Local) -> Local:
    return Local({}, local.positions[:, :0], local.valid[:, :0])


def _still_open(tree: Tree, positions: Tensor, valid: Tensor, closes: Tensor) -> Local:
    """Drop what belongs to closed segments; columns that no row needs go altogether."""
    valid = valid & ~closes[:, None]
    used = valid.any(0)
    if not bool(used.any()):
        return Local({}, positions[:, :0], valid[:, :0])
    if not bool(used.all()):
        columns = used.nonzero().squeeze(1)
        tree = tree_map(lambda t: t.index_select(2, columns.to(t.device)), tree)
        positions, valid = positions[:, used], valid[:, used]
    return Local(tree, positions, valid)
