"""States of slots as a whole: made small, joined, and the rows that they hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.memories.parts.compacting import Compacts
from memwrap.memories.parts.reference_queries import ReferenceQueries
from memwrap.memories.parts.slots import (
    References,
    Rows,
    clamped,
    compacted,
    errors_of,
    slots_of,
    with_slots,
)
from memwrap.ops.buffers import filled, take
from memwrap.state.trees import Tree


class WholeStates(Compacts):
    """The part of a memory of sinks, slots and recent rows that concerns its states as a whole.

    Attributes:
        references: the rule by which queries are kept.
        budgets: slots of every KV head, `(Hkv,)`, by layer.
    """

    references: ReferenceQueries
    budgets: dict[int, Tensor]

    def _most_slots(self, tree: Tree) -> int:
        """Give the most slots that a row of a layer's tree may ask for."""
        return max(self.config.slots, tree["slot_key"].shape[2])

    def _budget(self, layer: int, limit: Tensor) -> Tensor:
        """Give the slots `(B, Hkv)` of rows that may have `limit` `(B,)` on average."""
        base = self.budgets[layer].to(limit.device)
        return (base * limit[:, None] // self.config.slots).clamp_min(1)

    def _sinks(self, state: Tree) -> MemoryKeyValues:
        size = self.config.num_sinks
        number = torch.arange(size, device=state["tokens"].device)
        place = number + clamped(-state["tokens"], self.config.max_distance)[:, None]
        visible = filled(state["sink_count"], size)
        return MemoryKeyValues(state["sink_key"], state["sink_value"], place, visible)

    def _with_sinks(
        self, state: Tree, rows: tuple[Tensor, Tensor], first: Tensor, leaving: Tensor
    ) -> Tree:
        """Take those of the leaving rows that are the document's first."""
        size = self.config.num_sinks
        if not rows[0].shape[2]:
            return state
        index = torch.arange(size, device=first.device) - first[:, None]
        new = (index >= 0) & (index < leaving[:, None])
        index = index.clamp(0, rows[0].shape[2] - 1)
        made = {
            f"sink_{n}": torch.where(new[:, None, :, None], take(x, index), state[f"sink_{n}"])
            for n, x in zip(("key", "value"), rows, strict=True)
        }
        return {**state, **made, "sink_count": state["sink_count"] + new.sum(1)}

    def has_queries(self, tree: Tree) -> bool:
        free = [n for n in self.chosen if self.sizes.attention[n].window is None]
        counts = [tree["layers"][str(n)].get("past_count") for n in free]
        return all(count is not None and bool((count > 0).all()) for count in counts)

    def _compact_layer(
        self, layer: int, attention: LayerAttention, state: Tree, limit: int,
        references: References,
    ) -> Tree:  # fmt: skip
        """Make at most `limit` slots of all that a layer's tree holds but for the sinks."""
        wanted = torch.full_like(state["limit"], limit)
        dims = self.sizes.attention[layer]
        if dims.window is not None:
            return {**state, "limit": wanted.clamp_max(self._most_slots(state))}
        rows = self._recent_rows(state)
        first, count = state["tokens"] - state["recent_count"], state["recent_count"]
        state = self._with_sinks(state, (rows.key, rows.value), first, count)
        number = torch.arange(rows.key.shape[2], device=count.device)
        behind = number + first[:, None] >= self.config.num_sinks
        rows = Rows(rows.key, rows.value, rows.bias, rows.place, rows.valid & behind[:, None])
        pool, farthest = slots_of(state).beside(rows), self.config.max_distance
        slots = compacted(
            attention, pool, self._budget(layer, wanted), references, self.config.matching,
            farthest, dims.softcap,
        )  # fmt: skip
        request = self.request
        if request is not None and request.measures:
            stay = self._sinks(state)
            sinks = Rows.plain(stay.keys, stay.values, stay.positions, stay.visible)
            request.errors[layer] = errors_of(
                attention, pool, slots, sinks, references, farthest, dims.softcap
            )
        new = {**with_slots(state, slots, torch.zeros_like(count)), **self._nothing_recent(state)}
        return {**new, "limit": wanted.clamp_max(self._most_slots(new))}

    def _recent_rows(self, state: Tree) -> Rows:
        count, size = state["recent_count"], state["recent_key"].shape[2]
        place = torch.arange(size, device=count.device) - count[:, None]
        return Rows.plain(state["recent_key"], state["recent_value"], place, filled(count, size))

    def _nothing_recent(self, state: Tree) -> Tree:
        """Give the parts of a tree for recent rows and kept queries, without any."""
        new = {f"recent_{n}": state[f"recent_{n}"][:, :, :0].clone() for n in ("key", "value")}
        return {**new, "recent_count": torch.zeros_like(state["recent_count"]),
                **self.references.without_kept(state)}  # fmt: skip

    def joined(self, trees: Sequence[Tree]) -> Tree:
        layers = {
            name: self._joined_layer(int(name), [tree["layers"][name] for tree in trees])
            for name in trees[0]["layers"]
        }
        return {"layers": layers}

    def rows_of(self, layer: int, tree: Tree) -> Rows:
        """Take all rows of a layer's tree, in the order of the text."""
        sinks = self._sinks(tree)
        rows = Rows.plain(sinks.keys, sinks.values, sinks.positions, sinks.visible)
        rows = rows.beside(slots_of(tree), self._recent_rows(tree))
        return rows.packed(int(rows.valid.sum(-1).max()))

    def with_rows(self, layer: int, tree: Tree, rows: Rows) -> Tree:
        """Put rows into an empty layer's tree: the first of them as sinks, the others as slots."""
        count = rows.key.shape[2]
        sinks = min(self.config.num_sinks, count)
        parts = [
            Rows(
                *(getattr(rows, n)[:, :, part] for n in ("key", "value", "bias", "place", "valid"))
            )
            for part in (slice(sinks), slice(sinks, None))
        ]
        slots = parts[1].padded(tree["slot_key"].shape[2])
        new = with_slots(tree, slots, torch.zeros_like(tree["tokens"]))
        for name in ("key", "value"):
            x = torch.zeros_like(tree[f"sink_{name}"])
            x[:, :, :sinks] = getattr(parts[0], name)
            new[f"sink_{name}"] = x
        new["sink_count"] = torch.full_like(tree["tokens"], sinks)
        new["tokens"] = torch.full_like(tree["tokens"], count)
        new["limit"] = torch.full_like(tree["limit"], max(count - sinks, 1))
        return new

    def _joined_layer(self, layer: int, trees: list[Tree]) -> Tree:
        """Put the rows of all trees, but for the first one's sinks, into slots of the first."""
        first = trees[0]
        if self.sizes.attention[layer].window is not None:
            return first
        parts = [slots_of(first), self._recent_rows(first)]
        for tree in trees[1:]:
            parts.append(self.rows_of(layer, tree))
        rows = parts[0].beside(*parts[1:])
        rows = rows.packed(int(rows.valid.sum(-1).max()))
        new = with_slots(first, rows, torch.zeros_like(first["tokens"]))
        limits = sum(tree["limit"] for tree in trees)
        most = torch.maximum(limits, rows.valid.sum(-1).amax(1))
        new["limit"] = most.clamp_max(self._most_slots(new))
        kept = self.references.joined(trees)
        return {**new, **self._nothing_recent(first), **kept}
