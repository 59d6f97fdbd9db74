"""The tensors of one step: what the backbone is given, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.backbones import Backbone, Positions
from memwrap.engine.insertion import Block, NoInsertion, TokenInsertion, wide
from memwrap.engine.plan import Step
from memwrap.memories.protocol import InsertsTokens, Memory, SoftPrompt
from memwrap.ops import narrowed
from memwrap.state.open_segment import OpenSegment
from memwrap.state.trees import Tree


@dataclass(frozen=True)
class StepInput:
    """The N' columns that a step runs: prefix, tokens, suffix, each if any row has it now.

    Attributes:
        embeds: `(B, N', D)`.
        positions: where they and the columns of the open segment stand, and which are real.
        position_ids: `(B, N')` where the backbone is told other positions, else None.
        base: `(B, 1)` positions of the prefix in front of each row's tokens.
        tokens: the columns of the N tokens, or `(B, N)` where others are inserted among them.
        following: the same, but of the inserted token behind one that fills a block.
        ends: `(B, N)` bool, tokens that fill a block; None: nothing is inserted.
    """

    embeds: Tensor
    positions: Positions
    position_ids: Tensor | None
    base: Tensor
    tokens: slice | Tensor
    following: slice | Tensor
    ends: Tensor | None

    def of_tokens(self, hidden: Tensor, following: bool = False) -> Tensor:
        """Take `hidden` `(B, N', D)` at the tokens, `(B, N, D)`; `following`: at the token inserted
        behind one that fills a block instead."""
        at = self.following if following else self.tokens
        return hidden[:, at] if isinstance(at, slice) else hidden.gather(1, wide(at, hidden))

    def spread(self, ids: Tensor) -> Tensor:
        """Put the tokens' ids `(B, N)` at their columns, -1 elsewhere: `(B, N', 1)`."""
        at = self.tokens
        if isinstance(at, slice):
            at = torch.arange(at.start, at.stop).expand_as(ids)
        empty = ids.new_full(self.embeds.shape[:2], -1)
        # Where there is no token stands -1, which takes no place from another.
        return empty.scatter_reduce(1, at.to(ids.device), ids, "amax").unsqueeze(-1)

    @property
    def plain(self) -> bool:
        """Whether causal attention over contiguous positions is all there is to mask."""
        positions = self.positions
        return (
            positions.key_positions.shape == positions.query_positions.shape
            and positions.ordered
            and (self.position_ids is None)
        )

    @property
    def inside(self) -> Tensor:
        """`(B, K)` bool: columns of the segment's own, neither prefix nor inserted."""
        return (self.positions.key_positions >= self.base) & ~self.positions.inserted


class InputLayout:
    """The layout of steps: the prefix and suffix of all memories, and what one inserts.

    Attributes:
        prompts: the memories with a prefix or suffix.
        num_suffix: columns of all suffixes.
        suffixes: where each one's stands among a closing step's columns, counted from their end.
        insertion: of the memory that inserts tokens, or of none.
        zero_positions: prefix and suffix take no position of the backbone's table.
    """

    def __init__(self, backbone: Backbone, memories: dict[str, Memory], padding: bool) -> None:
        self.backbone = backbone
        self.prompts = {n: m for n, m in memories.items() if isinstance(m, SoftPrompt)}
        self.suffixes: dict[str, slice] = {}
        self.num_suffix = sum(m.num_suffix for m in self.prompts.values())
        end = -self.num_suffix
        for name, memory in self.prompts.items():
            start, end = end, end + memory.num_suffix
            self.suffixes[name] = slice(start, end or None) if start < end else slice(0)
        self.insertion = NoInsertion()
        for name, other in memories.items():
            if isinstance(other, InsertsTokens):
                self.insertion = TokenInsertion(name, other, backbone, padding)
        has_table = backbone.max_positions is not None
        self.zero_positions = has_table and any(m.zero_positions for m in self.prompts.values())
        self._asks_table = self.zero_positions or (has_table and self.insertion.inserts)

    @property
    def prefix_positions(self) -> int:
        """Most positions that the prefix takes in front of a segment's tokens."""
        return 0 if self.zero_positions else sum(m.num_prefix for m in self.prompts.values())

    def __call__(
        self, embeds: Tensor, step: Step, states: dict[str, Tree], segment: OpenSegment
    ) -> StepInput:
        """Lay out a step.

        Args:
            embeds: `(B, N, D)` of the step's tokens.
            step: the plan.
            states: the memories' trees.
            segment: what is open before it.
        """
        mask = self._prefix_mask(states, len(embeds))
        base = mask.sum(1)[:, None]
        tokens, places = self.insertion.columns(embeds, step, states)
        table = tokens.table if self.zero_positions else tokens.table + base
        tokens = tokens._replace(positions=tokens.positions + base, table=table)
        prefix = self._prefix(states, step, mask, embeds.dtype)
        blocks = [*prefix, tokens, *self._suffix(states, step, base, embeds.dtype)]
        x, valid, order, table, inserted = (
            torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*blocks, strict=True)
        )
        inserted = torch.cat([self.insertion.at(segment.positions - base), inserted], 1)
        positions = Positions.of((segment.positions, segment.valid), (order, valid), inserted)
        ids = table if self._asks_table else None
        first = prefix[0].valid.shape[1] if prefix else 0
        if places is None:
            at = slice(first, first + embeds.shape[1])
            return StepInput(x, positions, ids, base, at, at, None)
        columns, ends, following = places
        return StepInput(x, positions, ids, base, first + columns, first + following, ends)

    def _prefix_mask(self, states: dict[str, Tree], batch: int) -> Tensor:
        """Tell which vectors of the prefix exist, `(B, P)` bool."""
        parts = [torch.zeros(batch, 0, dtype=torch.bool)]
        for name, memory in self.prompts.items():
            mask = memory.prefix_mask(states[name]) if memory.num_prefix else None
            if mask is None:
                mask = torch.ones(batch, memory.num_prefix, dtype=torch.bool)
            parts.append(mask.cpu())
        return torch.cat(parts, 1)

    def _prefix(
        self, states: dict[str, Tree], step: Step, mask: Tensor, dtype: torch.dtype
    ) -> list[Block]:
        valid = mask & step.opens[:, None]
        used = valid.any(0)
        if not bool(used.any()):
            return []
        prompts = [(n, m) for n, m in self.prompts.items() if m.num_prefix]
        x = narrowed(torch.cat([m.prefix(states[n]) for n, m in prompts], 1), dtype)
        if not bool(used.all()):  # columns that no row needs
            x = x[:, used.nonzero().squeeze(1).to(x.device)]
        order = (mask.long().cumsum(1) - 1).clamp(min=0)[:, used]
        return [self._outside(x, valid[:, used], order, order)]

    def _suffix(
        self, states: dict[str, Tree], step: Step, base: Tensor, dtype: torch.dtype
    ) -> list[Block]:
        if not self.num_suffix or not bool(step.closes.any()):
            return []
        prompts = [(n, m) for n, m in self.prompts.items() if m.num_suffix]
        x = narrowed(torch.cat([m.suffix(states[n]) for n, m in prompts], 1), dtype)
        count = torch.arange(self.num_suffix) + base
        order, table = (end[:, None] + count for end in (self.insertion.end(step.ends), step.ends))
        valid = step.closes[:, None].expand(-1, self.num_suffix)
        return [self._outside(x, valid, order, table)]

    def _outside(self, x: Tensor, valid: Tensor, order: Tensor, table: Tensor) -> Block:
        """Make a block that is none of tokens, and hide it from a table of positions that shall not
        change it."""
        if self.zero_positions:
            x, table = x - self.backbone.first_position().to(x.dtype), torch.zeros_like(table)
        return Block(x, valid, order, table, torch.zeros_like(valid))
