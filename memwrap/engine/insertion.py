"""Tokens that a memory puts among a segment's own: where they stand, and what they are.

`NoInsertion` is what there is where no memory inserts any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memwrap.backbones import Backbone
from memwrap.engine.plan import Step
from memwrap.memories.protocol import InsertsTokens
from memwrap.ops import narrowed
from memwrap.state.trees import Tree


class Block(NamedTuple):
    """Columns of a step's input: a prefix, tokens and those inserted among them, a suffix.

    Attributes:
        embeds: `(B, C, D)`.
        valid: `(B, C)` bool.
        positions: `(B, C)` the order in the segment.
        table: `(B, C)` the same without inserted tokens, as a table of positions is asked.
        inserted: `(B, C)` bool.
    """

    embeds: Tensor
    valid: Tensor
    positions: Tensor
    table: Tensor
    inserted: Tensor


# Of tokens with others among them, each `(B, N)`: their columns, which of them fill a block, and
# the column of the token inserted behind it there, the token's own elsewhere.
Places = tuple[Tensor, Tensor, Tensor]


class NoInsertion:
    """The null object: tokens stay where they are."""

    inserts = False
    in_loss = False
    id: int | None = None

    def columns(
        self, embeds: Tensor, step: Step, states: dict[str, Tree]
    ) -> tuple[Block, Places | None]:
        """Lay out the step's tokens, `embeds` `(B, N, D)`, as columns, with positions behind the
        prefix; None for places says that token n stands in column n."""
        valid = step.columns >= 0
        return Block(embeds, valid, step.offsets, step.offsets, torch.zeros_like(valid)), None

    def end(self, tokens: Tensor) -> Tensor:
        """Compute the positions `(B,)` behind the first `tokens` `(B,)` of a closed segment."""
        return tokens

    def tokens(self, positions: Tensor) -> Tensor:
        """Count a segment's tokens up to and with the given positions, the prefix not counted."""
        return positions + 1

    def at(self, positions: Tensor) -> Tensor:
        """Tell which positions in a segment, the prefix not counted, are those of inserted
        tokens."""
        return torch.zeros_like(positions, dtype=torch.bool)

    def count(self, step: Step, mask: Tensor) -> int:
        """Count the inserted tokens that are targets: those behind a token of `mask` `(B, N)`."""
        return 0


class TokenInsertion(NoInsertion):
    """One token after every so many of a segment, and at its close after what is left.

    Args:
        name, memory: whose tokens they are.
        backbone: embeds those of the vocabulary.
        count_padding: padding fills blocks, too.
    """

    inserts = True

    def __init__(
        self, name: str, memory: InsertsTokens, backbone: Backbone, count_padding: bool
    ) -> None:
        self.name, self.memory, self.backbone = name, memory, backbone
        self.every, self.id = memory.insertion.every, memory.insertion.id
        self.in_loss = memory.insertion.in_loss
        self.count_padding = count_padding

    def end(self, tokens: Tensor) -> Tensor:
        return tokens + (tokens + self.every - 1) // self.every

    def tokens(self, positions: Tensor) -> Tensor:
        return positions + 1 - (positions + 1) // (self.every + 1)

    def at(self, positions: Tensor) -> Tensor:
        return positions % (self.every + 1) == self.every

    def count(self, step: Step, mask: Tensor) -> int:
        return int((self._full(step) & mask.cpu()).sum()) if self.in_loss else 0

    def columns(
        self, embeds: Tensor, step: Step, states: dict[str, Tree]
    ) -> tuple[Block, Places | None]:
        """Lay out tokens and inserted ones by position."""
        real, full = step.columns >= 0, self._full(step)
        positions = step.offsets + step.offsets // self.every
        rest = step.closes & (step.ends % self.every != 0)
        count = int(full.sum(1).max()) if full.numel() else 0
        if not count and not bool(rest.any()):
            return Block(embeds, real, positions, step.offsets, torch.zeros_like(real)), None
        index = (~full).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
        followed, valid = step.offsets.gather(1, index), full.gather(1, index)
        if bool(rest.any()):
            followed = torch.cat([followed, (step.ends - 1).clamp_min(0)[:, None]], 1)
            valid = torch.cat([valid, rest[:, None]], 1)
        both = torch.cat([positions, self.end(followed + 1) - 1], 1)
        valid = torch.cat([real, valid], 1)
        order = both.masked_fill(~valid, int(both.max()) + 1).argsort(dim=1, stable=True)
        column = order.argsort(1)
        tokens = column[:, : full.shape[1]]
        rank = full.shape[1] + (full.long().cumsum(1) - 1).clamp_min(0)
        x = torch.cat([embeds, self._embeds(embeds, states, followed.shape[1])], 1)
        block = Block(
            x.gather(1, wide(order, x)),
            valid.gather(1, order),
            both.gather(1, order),
            torch.cat([step.offsets, followed], 1).gather(1, order),
            order >= real.shape[1],
        )
        return block, (tokens, full, torch.where(full, column.gather(1, rank), tokens))

    def _full(self, step: Step) -> Tensor:
        """Tell which tokens fill a block, counted from the segment's start: `(B, N)` bool."""
        counted = self.count_padding | (step.columns >= 0)
        return counted & ((step.offsets + 1) % self.every == 0)

    def _embeds(self, embeds: Tensor, states: dict[str, Tree], count: int) -> Tensor:
        if self.id is None:
            vector = self.memory.inserted(states[self.name])
        else:
            vector = self.backbone.embed(torch.full((1, 1), self.id, device=embeds.device))
        return narrowed(vector, embeds.dtype).expand(len(embeds), count, -1)


def wide(index: Tensor, like: Tensor) -> Tensor:
    """Widen an index `(B, N)` of the columns of `like` `(B, C, D)` to what gather takes."""
    return index.to(like.device)[..., None].expand(-1, -1, like.shape[-1])
