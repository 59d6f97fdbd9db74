"""All keys and values before the open segment, for layers that keep what they have read.

A layer's tree holds `past_key` and `past_value` `(B, Hkv, N, D)`, un-rotated and filled from the
left, and `past_count` `(B,)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.backbones.layer_attention import LayerAttention
from memwrap.backbones.positions import MemoryKeyValues
from memwrap.ops.buffers import filled, take
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


@dataclass(frozen=True)
class WholePast:
    """The rows of a layer's past.

    Attributes:
        limit: so many rows at most, the last; None: all.
    """

    limit: int | None = None

    @classmethod
    def of(cls, dims: AttentionSizes) -> WholePast:
        """Make it for a layer: what its own sliding window does not reach is not kept."""
        return cls(None if dims.window is None else dims.window - 1)

    def bytes_per_token(self, dims: AttentionSizes, dtype: torch.dtype) -> float:
        """Count the bytes a token and row that it grows by; 0 with a limit."""
        numbers = dims.num_kv_heads * (dims.key_dim + dims.value_dim)
        return numbers * dtype.itemsize if self.limit is None else 0

    def empty(
        self, batch_size: int, dims: AttentionSizes, dtype: torch.dtype, device: torch.device
    ) -> Tree:
        """Make its part of a layer's tree before the first token."""
        make: dict[str, Any] = {"dtype": dtype, "device": device}
        shape = (batch_size, dims.num_kv_heads, 0)
        return {
            "past_key": torch.zeros(*shape, dims.key_dim, **make),
            "past_value": torch.zeros(*shape, dims.value_dim, **make),
            "past_count": torch.zeros(batch_size, dtype=torch.long, device=device),
        }

    def ranges(self, tree: Tree, progress: Progress) -> Iterator[tuple[Tensor, Any, Any]]:
        """Say what the whole numbers in a layer's tree may be."""
        yield tree["past_count"], 0, progress.closed[1].clamp_max(tree["past_key"].shape[2])

    def read(
        self, attention: LayerAttention, state: Tree, window: int | None, whole: Tensor | None
    ) -> MemoryKeyValues:
        """Give the rows as attention reads them.

        Args:
            attention: of the step.
            state: the layer's tree.
            window: tokens that a query sees, itself among them; None: all.
            whole: `(B, T)` bool, queries that see all that the layer's own window lets them.
        """
        count, size = state["past_count"], state["past_key"].shape[2]
        name = ("past", self, size, window, attention.window)

        def seen() -> tuple[Tensor, Tensor]:
            place = torch.arange(size, device=count.device) - count[:, None]
            visible = filled(count, size)
            if window is None and attention.window is None:
                return place, visible
            distance = attention.query_positions[:, :, None] - place[:, None]
            most = attention.window
            near = distance < min(n for n in (window, most) if n is not None)
            if whole is not None:
                wide = whole[:, :, None].expand_as(near)
                near = near | (wide if most is None else wide & (distance < most))
            return place, visible[:, None] & near

        place, visible = attention.cached_per_step(name, seen)
        return MemoryKeyValues(state["past_key"], state["past_value"], place, visible, static=True)

    def closed(self, attention: LayerAttention, state: Tree) -> Tree:
        """Make the segment part of the past."""
        count, size = state["past_count"], state["past_key"].shape[2]
        total, order, valid = attention.cached_per_step(
            ("past closed", self, size), lambda: self._order(attention, count, size)
        )
        new = {**state, "past_count": total}
        for name, rows in (("past_key", attention.key), ("past_value", attention.value)):
            both = torch.cat([state[name], rows.to(state[name])], 2)
            new[name] = both if order is None else take(both, order, valid)
        return new

    def _order(
        self, attention: LayerAttention, count: Tensor, size: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Choose what stays: how many rows, which of the old and the segment's `(B, M)`, and which
        of these are real; None: all of them."""
        real = torch.cat([filled(count, size), attention.key_valid], 1)
        total = real.sum(1)
        if self.limit is None and bool(real.all()):
            return total, None, None
        stays = total if self.limit is None else total.clamp_max(self.limit)
        width = max(size, int(stays.max()))
        order = earliest(real, real.shape[1])
        index = torch.arange(width, device=count.device) + (total - stays)[:, None]
        index = index.clamp_max(real.shape[1] - 1)
        return stays, order.gather(1, index), filled(stays, width)
