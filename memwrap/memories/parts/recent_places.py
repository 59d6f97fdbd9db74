"""Where the recent tokens of a memory of units stand, and what becomes of them: what depends on
positions alone, and is the same in all layers.

Recent tokens are the window and what has left it but does not fill a unit yet. Shapes: B rows, T
queries, K keys of the open segment, R recent tokens, n sinks, P tokens past the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention
from memwrap.memories.parts import block_units
from memwrap.ops.buffers import take as take_rows
from memwrap.ops.buffers.left_aligned import earliest


@dataclass(frozen=True)
class Layout:
    """The places of a step's keys, and who sees them.

    Attributes:
        valid, positions: `(B, R)` of the recent tokens: which are there, and where.
        visible, local: `(B, T, R)` and `(B, T, K)` bool, which of them and of the segment's are
            seen where they stand.
        past: `(B, T, P)` bool, which of the first recent ones are seen past the window.
        sinks: `(B, T, n)` bool; `some_sinks`: there is one.
        far: `(B, T)`, where the queries stand as units, sinks and the past see them.
    """

    valid: Tensor
    positions: Tensor
    visible: Tensor
    local: Tensor
    past: Tensor
    sinks: Tensor
    some_sinks: bool
    far: Tensor

    @classmethod
    def of(
        cls, attention: LayerAttention, valid: Tensor, before: Tensor, sinks: Tensor, reach: int,
        window: int, *, looks_up: bool, published: bool,
    ) -> Layout:  # fmt: skip
        """Lay out a step.

        Args:
            attention: of a layer.
            valid: `(B, R)`.
            before: `(B,)` tokens that were read before the segment.
            sinks: `(B, n)` bool, those that have left the window.
            reach, window: tokens that the layer sees in order, and that the window holds.
            looks_up: the layer sees all that is past the window; otherwise the sinks alone.
            published: the window's edge is seen as the published code has it.
        """
        queries, keys = attention.query_positions, attention.key_positions.shape[1]
        length = queries.shape[1]
        positions = torch.arange(-valid.shape[1], 0, device=valid.device).expand(len(valid), -1)
        distance = queries[:, :, None] - positions[:, None]
        # Only the first columns can be past the window: a place is less than K.
        count = max(0, min(valid.shape[1], valid.shape[1] + keys - window))
        count = valid.shape[1] if count and length == 1 else count  # whole buffers stay rotated
        past = valid[:, None, :count] & (distance[..., :count] >= window)
        if not looks_up:
            past &= (before[:, None] + positions < sinks.shape[1])[:, None, :count]
        elif published:
            read = (attention.key_positions + 1).masked_fill(~attention.key_valid, 0).amax(1)
            live = valid.sum(1)
            first = valid.shape[1] - live + (live + read - window).clamp_min(0)
            past = valid[:, :count] & (torch.arange(count, device=valid.device) < first[:, None])
            past = past[:, None].expand(-1, length, -1)
        return cls(
            valid, positions, valid[:, None] & (distance < reach),
            queries[:, :, None] - attention.key_positions[:, None] < reach,
            past if bool(past.any()) else past[..., :0],
            sinks[:, None].expand(-1, length, -1), bool(sinks.any()),
            torch.full_like(queries, reach - 1),
        )  # fmt: skip


@dataclass(frozen=True)
class PoolPlan:
    """Plan of what becomes of the recent tokens and the segment's, the pool, as a segment closes:
    the first are sinks, then come units, and the rest stays.

    Attributes:
        tokens: `(B,)` read with the segment.
        before: `(B,)` sinks and units before it; `sinks`, `units`: `(B,)` new ones.
        start, total: `(B,)`, where in the pool the rest begins, and the pool's end; `most`: of the
            rest, in the row that has most.
        order: `(B, N)`, which of the pool's rows come first; None: they are in order.
        some: whether there are new sinks, and new units.
        alike: the number of sinks, where the rest begins and the pool's end, in every row; None:
            rows differ.
    """

    tokens: Tensor
    before: tuple[Tensor, Tensor]
    sinks: Tensor
    units: Tensor
    start: Tensor
    total: Tensor
    most: int
    order: Tensor | None
    some: tuple[bool, bool]
    alike: tuple[int, int, int] | None

    @classmethod
    def of(
        cls, valid: Tensor, before: tuple[Tensor, Tensor, Tensor],
        after: tuple[Tensor, Tensor, Tensor], block: int,
    ) -> PoolPlan:  # fmt: skip
        """Plan a segment's end.

        Args:
            valid: `(B, N)` bool, which of the recent rows and the segment's are real.
            before, after: `(B,)` tokens, sinks and units before and behind the segment.
            block: tokens of a unit.
        """
        sinks, units = (after[n] - before[n] for n in (1, 2))
        start, total = sinks + units * block, valid.sum(1)
        order = None if bool(valid.all()) else earliest(valid, valid.shape[1])
        rows = torch.stack([sinks, start, total], 1)
        same = order is None and len(rows) > 0 and bool((rows == rows[:1]).all())
        alike: Any = tuple(rows[0].tolist()) if same else None
        some = bool((sinks > 0).any()), bool((units > 0).any())
        most = int((total - start).max()) if len(rows) else 0
        return cls(after[0], before[1:], sinks, units, start, total, most, order, some, alike)

    def pool(self, recent: Tensor, segment: Tensor) -> Tensor:
        """Put rows `(B, H, K, D)` of the segment behind the recent ones, those that are real
        first."""
        rows = torch.cat([recent, segment.to(recent.dtype)], 2)
        return rows if self.order is None else take_rows(rows, self.order)

    def blocks(self, pool: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """Cut the new units out of a pool, `(B, U, H, size, D)`."""
        if self.alike is None:
            return block_units.blocks_of(pool, self.sinks, self.units, size)
        first, start, _ = self.alike
        return {
            n: x[:, :, first:start].unflatten(2, (-1, size)).transpose(1, 2)
            for n, x in pool.items()
        }

    def rest(self, pool: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the rest of a pool, at the right end of buffers of `most` rows."""
        if self.alike is not None:
            _, start, total = self.alike
            return {n: x[:, :, start:total].clone() for n, x in pool.items()}
        index = torch.arange(pool["key"].shape[2], device=self.start.device)
        left = (index >= self.start[:, None]) & (index < self.total[:, None])
        return block_units.kept_rows(pool, left, self.total - self.start, self.most)
