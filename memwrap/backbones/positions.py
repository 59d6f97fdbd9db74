"""Where the queries and keys of a step stand, and what a memory puts in front of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Positions:
    """The positions of the T queries and K keys of a step in their segments, and which are real.

    Attributes:
        query_positions, key_positions: `(B, T)` and `(B, K)`; a segment starts at 0.
        query_valid, key_valid: `(B, T)` and `(B, K)` bool; False is padding.
        inserted: `(B, K)` bool, the keys of tokens that a memory inserted.
        length: one more than the largest position of a key.
        ordered: the keys of every row stand at positions 0, 1, ... without padding.
        answers: `(B, T)` bool, queries that are part of an answer; None: none of them are.
    """

    query_positions: Tensor
    key_positions: Tensor
    query_valid: Tensor
    key_valid: Tensor
    inserted: Tensor
    length: int
    ordered: bool
    answers: Tensor | None = None

    @classmethod
    def of(
        cls, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor], inserted: Tensor
    ) -> Positions:
        """Make them from positions and validity of the open segment's columns and the step's."""
        keys, valid = (torch.cat(pair, 1) for pair in zip(before, now, strict=True))
        total = keys.shape[1]
        length = int(keys.max()) + 1 if keys.numel() else 0
        ordered = bool(valid.all()) and bool((keys == torch.arange(total)).all())
        return cls(now[0], keys, now[1], valid, inserted, length, ordered)

    def to(self, device: torch.device) -> Positions:
        """Move the tensors to a device."""
        moved: Any = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)

    def of_queries(self, start: int, stop: int) -> Positions:
        """Keep the queries `start` to `stop`, and all keys."""
        return replace(
            self,
            query_positions=self.query_positions[:, start:stop],
            query_valid=self.query_valid[:, start:stop],
            answers=None if self.answers is None else self.answers[:, start:stop],
        )


@dataclass
class MemoryKeyValues:
    """Keys and values that a memory puts in front of a segment's own.

    Attributes:
        keys, values: `(B, Hkv, M, Dk)` un-rotated and `(B, Hkv, M, Dv)`.
        positions: `(B, M)`, where 0 is the segment's first place: negative for the past; or, where
            they differ by KV head, `(B, Hkv, M)`.
        visible: `(B, M)` or, different for each query, `(B, T, M)` bool.
        query_positions: `(B, T)`, where the queries stand as these keys see them; None: where
            they stand in the segment.
        static: the positions are the same for as long as the tensor `keys` lives, so that it need
            not be rotated anew for every token that is decoded.
        name: says that these positions, of keys and queries, are the same in all layers of the step
            that name them so.
        bias: `(B, Hkv, M)`, added to the scores (behind a soft cap); -inf where a KV head does not
            have the entry. None: nothing.
        by_layer: who sees them differs from layer to layer, whatever name the others share.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    visible: Tensor
    query_positions: Tensor | None = None
    static: bool = False
    bias: Tensor | None = None
    name: Hashable | None = None
    by_layer: bool = False

    def moved_to(self, query_positions: Tensor) -> MemoryKeyValues:
        """Move the keys instead of the queries, as one query a row of the batch, which stands at
        `query_positions` `(B, 1)` in the segment, sees them."""
        if self.query_positions is None:
            return self
        shift = query_positions - self.query_positions
        by_head = self.positions.dim() == 3
        positions = self.positions + (shift[:, None] if by_head else shift)
        return replace(self, positions=positions, query_positions=None, static=False, name=None)
