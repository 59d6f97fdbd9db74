"""A sliding window of keys that spans the ends of segments, with the document's first tokens.

What is kept are un-rotated keys and values of the last tokens before the open segment, the youngest
last, and of the first ones. Shapes: B rows, Hkv key-value heads, W rows of the window, as many as
were read until there are `kept`, n sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.backbones.layer_attention import LayerAttention
from memwrap.backbones.positions import MemoryKeyValues
from memwrap.ops.buffers import ring, take
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.ops.buffers.right_aligned import latest, lengthened, right_valid
from memwrap.state.progress import Progress
from memwrap.state.trees import RECENT, Tree


@dataclass(frozen=True)
class Evicted:
    """The row that leaves the window as each query of a step comes.

    Attributes:
        query_positions: `(B, T)` of the queries in the document, from 0.
        positions: `(B, T)` of the rows that leave; negative where none does.
        kept: `(B, T)` that row among the ones kept before the segment.
        size: rows that are kept, those not read yet among them.
        columns: `(B, T)` its column in the segment, where it is one of the segment's.
        inside: `(B, T)` bool, where it is; None: nowhere.
        run: they are these rows, one after the other, among the ones kept; None: they may not be.
    """

    query_positions: Tensor
    positions: Tensor
    kept: Tensor
    size: int
    columns: Tensor
    inside: Tensor | None
    run: slice | None

    def rows(self, window_rows: Tensor, segment_rows: Callable[[], Tensor]) -> Tensor:
        """Take what left, `(B, H, T, D)`: of the kept rows `(B, H, W, D)` and, where it is inside,
        of what `segment_rows` gives for `columns`, `(B, H, T, D)`."""
        window_rows = lengthened(window_rows, self.size)
        if self.run is not None:
            return window_rows[:, :, self.run]
        before = take(window_rows, self.kept)
        if self.inside is None:
            return before
        return torch.where(self.inside[:, None, :, None], segment_rows().to(window_rows), before)


@dataclass(frozen=True)
class VisibilityMasks:
    """The masks of a step: who sees whom.

    Attributes:
        window_positions: `(B, W)` of the window's rows; `window`: `(B, T, W)` bool, which are seen.
        local: `(B, T, K)` bool, inside the segment.
        sink_positions: `(B, n)`; `sinks`: `(B, T, n)` bool, which are seen.
        query_positions: `(B, T)`, where the sinks see the queries.
    """

    window_positions: Tensor
    window: Tensor
    local: Tensor
    sink_positions: Tensor
    sinks: Tensor
    query_positions: Tensor


@dataclass(frozen=True)
class SlidingWindow:
    """Every token attends to the last `size` tokens, itself among them, and to the sinks.

    A layer with a smaller window of its own keeps that one and gets no sinks. A sink that has
    left the window is seen at the distance that it has in a full cache of sinks and window.
    All layers of a memory have read the same tokens: what depends on nothing else is computed in
    the first of them.

    Attributes:
        size: tokens that a query sees.
        num_sinks: first tokens of the document that stay visible.
        kept: rows that are kept before a segment, once so many were read; at least `size - 1`,
            which is the default.
    """

    size: int
    num_sinks: int = 0
    kept: int = -1

    def __post_init__(self) -> None:
        if self.kept < 0:
            object.__setattr__(self, "kept", self.size - 1)  # a query sees itself too

    def empty(
        self, batch_size: int, dims: AttentionSizes, dtype: torch.dtype, device: torch.device,
        *, sizes: Tensor | None = None,
    ) -> Tree:  # fmt: skip
        """Make what a layer keeps before the first token; `sizes` `(B,)` are windows of the rows'
        own, none larger than `size`."""
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        tree: Tree = {"tokens": torch.zeros(batch_size, dtype=torch.long, device=device)}
        if sizes is not None:
            tree["sizes"] = sizes.to(device)
        shape = (batch_size, dims.num_kv_heads)
        widths = {"key": dims.key_dim, "value": dims.value_dim}
        tree[RECENT] = {n: torch.zeros(*shape, 0, width, **make) for n, width in widths.items()}
        for name, width in widths.items():
            tree[f"sink_{name}"] = torch.zeros(*shape, self.num_sinks, width, **make)
        return tree

    @property
    def reaches(self) -> int:
        """The farthest place at which queries see the sinks; 0 without any."""
        return self.size + self.num_sinks - 1 if self.num_sinks else 0

    def ranges(self, tree: Tree, progress: Progress) -> Iterator[tuple[Tensor, Any, Any]]:
        """Say what the whole numbers in a layer's tree may be."""
        yield tree["tokens"], *progress.closed
        yield tree["tokens"], 0, ring.most_counted(tree[RECENT]["key"].shape[2], self.kept)
        if "sizes" in tree:
            yield tree["sizes"], 1, self.size

    def attend(
        self, attention: LayerAttention, state: Tree, *, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in one softmax to window, sinks and segment; as `LayerAttention.join`."""
        name = ("window", self, attention.window)
        masks = attention.cached_per_step(name, lambda: self.masks(attention, state))
        window = MemoryKeyValues(
            state[RECENT]["key"], state[RECENT]["value"], masks.window_positions, masks.window,
            static=True,
        )  # fmt: skip
        if not self.num_sinks or attention.window is not None:
            return attention.join(window, local=masks.local, weights=weights, name=name)
        key, value = self.sinks(attention, state)
        sinks = MemoryKeyValues(
            key, value, masks.sink_positions, masks.sinks, masks.query_positions
        )
        return attention.join(sinks, window, local=masks.local, weights=weights, name=name)

    def closed(
        self, attention: LayerAttention, state: Tree, beside: dict[str, Tensor] | None = None
    ) -> Tree:
        """Make the segment part of the past; `beside` are rows `(B, H, K, D)` of the segment for
        what else stands in the state's `RECENT`."""
        tokens, count, kept, valid = attention.cached_per_step(
            ("kept", self), lambda: self._kept(attention, state)
        )
        recent: Tree = {}
        segment = {"key": attention.key, "value": attention.value}
        for name, rows in (segment | (beside or {})).items():
            more, old = rows.shape[2], state[RECENT][name]
            if kept is None:  # without padding what stays are the last rows
                first = old.shape[2] + more - count
                parts = [old[:, :, first:], rows[:, :, max(0, more - count) :].to(old)]
                recent[name] = torch.cat(parts, 2)
            else:
                recent[name] = take(torch.cat([old, rows.to(old)], 2), kept, valid)
        new = {**state, "tokens": tokens, RECENT: recent}
        if self.num_sinks:
            new["sink_key"], new["sink_value"] = self.sinks(attention, state)
        return new

    def evicted(self, attention: LayerAttention, state: Tree) -> Evicted:
        """Tell what leaves the window at each query of the step; needs `kept` of at least
        `size`."""
        return attention.cached_per_step(("evicted", self), lambda: self._evicted(attention, state))

    def evicted_key_values(self, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tensor]:
        """Take un-rotated keys `(B, Hkv, T, Dk)` and values `(B, Hkv, T, Dv)` of what leaves."""
        evicted = self.evicted(attention, state)
        columns, name = evicted.columns, ("evicted", self)
        key = evicted.rows(state[RECENT]["key"], lambda: attention.keys_at(columns, name))
        value = evicted.rows(state[RECENT]["value"], lambda: take(attention.value, columns))
        return key, value

    def _evicted(self, attention: LayerAttention, state: Tree) -> Evicted:
        valid, length = attention.key_valid, attention.query_valid.shape[1]
        rank = (valid.long().cumsum(1) - 1)[:, valid.shape[1] - length :].clamp_min(0)
        sizes = state["sizes"][:, None] if "sizes" in state else self.size
        column = rank - sizes  # of the valid ones; negative for those before the segment
        columns = earliest(valid, valid.shape[1]).gather(1, column.clamp_min(0))
        kept = (column + self.kept).clamp_max(self.kept - 1)
        positions = state["tokens"][:, None] + rank
        inside = column >= 0
        within = bool(inside.any())  # seldom in decoding: asked once a step, for all layers
        run = None
        if attention.positions.ordered and "sizes" not in state and not within:
            first = valid.shape[1] - length - self.size + self.kept
            run = slice(first, first + length)
        some = inside if within else None
        return Evicted(positions, positions - sizes, kept, self.kept, columns, some, run)

    def _kept(
        self, attention: LayerAttention, state: Tree
    ) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
        """Choose what stays: tokens read, how many rows stay, which of kept rows and the segment's
        these are, `(B, W)`, and which of them are real; None: the last rows, where rows that are
        not real hold zeros."""
        before, valid, present = state["tokens"], attention.key_valid, state[RECENT]["key"].shape[2]
        tokens = before + valid.sum(1)
        if attention.positions.ordered:
            return tokens, min(self.kept, present + valid.shape[1]), None, None
        count = ring.capacity(tokens, present, self.kept)
        rows = latest(torch.cat([right_valid(before, present), valid], 1), count)
        return tokens, count, rows, right_valid(tokens, count)

    def masks(self, attention: LayerAttention, state: Tree) -> VisibilityMasks:
        """Tell who sees whom in a step."""
        queries, before = attention.query_positions, state["tokens"]
        most = self.size if attention.window is None else min(self.size, attention.window)
        window: Tensor | int = most
        if "sizes" in state:
            window = state["sizes"][:, None, None].clamp_max(most)
        kept = state[RECENT]["key"].shape[2]
        positions = torch.arange(-kept, 0, device=before.device).expand(len(before), -1)
        recent = queries[:, :, None] - positions[:, None] < window
        recent &= right_valid(before, kept)[:, None]
        local = queries[:, :, None] - attention.key_positions[:, None] < window
        absolute = before[:, None] + queries
        sinks = torch.arange(self.num_sinks, device=before.device).expand(len(before), -1)
        last = window + self.num_sinks - 1
        return VisibilityMasks(
            positions, recent, local, sinks, absolute[:, :, None] - sinks[:, None] >= window,
            absolute.clamp_max(last[:, 0] if isinstance(last, Tensor) else last),
        )  # fmt: skip

    def sinks(self, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tensor]:
        """Take keys and values of the document's first tokens, those just read among them."""
        before = state["sink_key"], state["sink_value"]
        first = attention.cached_per_step(
            ("sinks", self), lambda: self._first(attention, state["tokens"])
        )
        if first is None:
            return before
        old, columns, valid = first
        read = attention.keys_at(columns, ("sinks", self)), take(attention.value, columns)
        key, value = (
            torch.where(old, kept, new.to(kept)) * valid
            for kept, new in zip(before, read, strict=True)
        )
        return key, value

    def _first(
        self, attention: LayerAttention, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Find the sinks: which were read before the segment `(B, 1, n, 1)`, the segment's columns
        of the others `(B, n)`, and which are read now `(B, 1, n, 1)`; None if all were read
        before."""
        if bool((before >= self.num_sinks).all()):
            return None
        valid = attention.key_valid
        numbers = torch.arange(self.num_sinks, device=before.device)
        columns = earliest(valid, min(self.num_sinks, valid.shape[1]))
        index = (numbers - before[:, None]).clamp(0, columns.shape[1] - 1)
        old = (numbers < before[:, None])[:, None, :, None]
        read = (numbers < (before + valid.sum(1))[:, None])[:, None, :, None]
        return old, columns.gather(1, index), read
