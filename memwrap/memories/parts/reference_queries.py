"""Queries that are kept to judge keys by: those at every r-th position of a segment.

Positions decide, not calls, so that any feed keeps the same. A layer's tree holds `query`
`(B, H, R, Dk)`, un-rotated, of the open segment; with `keeps` also `past_query` `(B, H, P, Dk)`,
`past_place` `(B, 1, P)` and `past_count` `(B,)` of all segments before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention
from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.memories.parts.slots import References
from memwrap.ops.buffers import filled, take
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.state.trees import Tree


@dataclass(frozen=True)
class ReferenceQueries:
    """The rule by which queries are kept.

    Attributes:
        every: r.
        size: positions of a segment; behind them none is kept.
        keeps: queries outlive their segment.
    """

    every: int
    size: int
    keeps: bool

    def empty(
        self, batch: int, dims: AttentionSizes, dtype: torch.dtype, device: torch.device
    ) -> Tree:
        """Make their part of a layer's tree."""
        make: dict[str, Any] = {"dtype": dtype, "device": device}
        none = torch.zeros(batch, dims.num_heads, 0, dims.key_dim, **make)
        if not self.keeps:
            return {"query": none}
        place = torch.zeros(batch, 1, 0, device=device)
        count = torch.zeros(batch, dtype=torch.long, device=device)
        return {"query": none, "past_query": none, "past_place": place, "past_count": count}

    def number(self, length: Tensor) -> Tensor:
        """Count the queries that are kept of `length` `(B,)` positions of an open segment."""
        return -(-length.clamp_max(self.size) // self.every)

    def noted(self, attention: LayerAttention, state: Tree) -> Tree:
        """Keep those of the step's queries whose turn it is."""
        slot, width = attention.cached_per_step(
            ("references", self), lambda: self._slots(attention)
        )
        query = state["query"]
        if slot is None and width <= query.shape[2]:
            return state
        new = torch.nn.functional.pad(
            query, (0, 0, 0, max(width, query.shape[2]) + 1 - query.shape[2])
        )
        if slot is not None:
            index = slot[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            index = torch.where(index < 0, new.shape[2] - 1, index)
            new = new.scatter(2, index, attention.query.detach().to(query.dtype))
        return {**state, "query": new[:, :, :-1]}

    def _slots(self, attention: LayerAttention) -> tuple[Tensor | None, int]:
        """Give where each query of the step goes `(B, T)`, -1 for nowhere (None: all), and how many
        the segment has so far."""
        position = attention.query_positions
        wanted = attention.query_valid & (position % self.every == 0) & (position < self.size)
        length = min(attention.positions.length, self.size)
        slot = torch.where(wanted, position // self.every, -1)
        return (slot if bool(wanted.any()) else None), -(-length // self.every)

    def of_step(self, attention: LayerAttention) -> References:
        """Take all of the step's own queries."""
        query = attention.query.detach()
        weight = attention.query_valid[:, None].expand(query.shape[:3]).float()
        return References(query, attention.query_positions, weight)

    def of_segment(self, attention: LayerAttention, state: Tree) -> References:
        """Take the closing segment's (and those that were kept)."""
        query = state["query"]
        place, present = attention.cached_per_step(
            ("references of the segment", self, query.shape[2]),
            lambda: self._asked(attention, query.shape[2]),
        )
        return References(query, place, present[:, None].expand(query.shape[:3]).float())

    def _asked(self, attention: LayerAttention, width: int) -> tuple[Tensor, Tensor]:
        place = torch.arange(width, device=attention.key_positions.device) * self.every
        place = place.expand(len(attention.key_positions), -1)
        same = attention.key_positions[:, None] == place[:, :, None]
        return place, (same & attention.key_valid[:, None]).any(-1)

    def closed(self, attention: LayerAttention, state: Tree) -> Tree:
        """Drop the segment's queries, or lay them to those that are kept."""
        new = {**state, "query": state["query"][:, :, :0]}
        if not self.keeps:
            return new
        given = self.of_segment(attention, state)
        before = state["past_query"].shape[2]
        present = torch.cat([filled(state["past_count"], before), given.weight[:, 0] > 0], 1)
        count = present.sum(1)
        order = earliest(present, max(before, int(count.max())))
        valid = filled(count, order.shape[1])
        query = torch.cat([state["past_query"], given.query], 2)
        place = torch.cat([state["past_place"], given.place[:, None].float()], 2)
        moved = attention.key_valid.sum(1)[:, None, None]
        return {
            **new,
            "past_query": take(query, order, valid),
            "past_place": (place.gather(2, order[:, None]) - moved) * valid[:, None],
            "past_count": count,
        }

    def kept(self, state: Tree) -> References:
        """Take those that outlived their segments."""
        query = state["past_query"]
        present = filled(state["past_count"], query.shape[2])
        weight = present[:, None].expand(query.shape[:3]).float()
        return References(query, state["past_place"][:, 0], weight)

    def without_kept(self, state: Tree) -> Tree:
        """Give their part of a tree, without any."""
        if not self.keeps:
            return {"query": state["query"][:, :, :0]}
        return {
            "query": state["query"][:, :, :0],
            "past_query": state["past_query"][:, :, :0],
            "past_place": state["past_place"][:, :, :0],
            "past_count": torch.zeros_like(state["past_count"]),
        }

    def joined(self, trees: list[Tree]) -> Tree:
        """Join the queries that several trees keep."""
        if not self.keeps:
            return {}
        query, place = (torch.cat([t[f"past_{n}"] for t in trees], 2) for n in ("query", "place"))
        present = torch.cat([filled(t["past_count"], t["past_query"].shape[2]) for t in trees], 1)
        count = present.sum(1)
        order = earliest(present, int(count.max()))
        valid = filled(count, order.shape[1])
        return {
            "past_query": take(query, order, valid),
            "past_place": place.gather(2, order[:, None]) * valid[:, None],
            "past_count": count,
        }
