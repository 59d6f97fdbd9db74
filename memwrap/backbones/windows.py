"""A sliding window of keys that spans the ends of segments, with the document's first tokens.

What is kept are un-rotated keys and values of the last tokens before the open segment, filled from
the right, and of the first ones. Shapes: B rows, Hkv key-value heads, W rows of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones.attention import LayerAttention, Rows
from memwrap.backbones.probing import AttentionSizes
from memwrap.ops.rows import earliest, latest, right_valid, take
from memwrap.trees import Tree


@dataclass(frozen=True)
class Leaving:
    """Which row leaves the window as each query of a step comes.

    Attributes:
        places: `(B, T)` of the queries in the document, from 0.
        left: `(B, T)` of the rows that leave; negative where none does.
        kept: `(B, T)` that row among the ones kept before the segment.
        columns: `(B, T)` its column in the segment, where it is one of the segment's.
        inside: `(B, T)` bool, where it is.
    """

    places: Tensor
    left: Tensor
    kept: Tensor
    columns: Tensor
    inside: Tensor

    def rows(self, kept: Tensor, own: Tensor) -> Tensor:
        """What left, `(B, H, T, D)`: of the kept rows `(B, H, W, D)` and of the leaving ones' own
        columns `(B, H, T, D)`."""
        return torch.where(self.inside[:, None, :, None], own.to(kept), take(kept, self.kept))


@dataclass(frozen=True)
class SlidingWindow:
    """Every token attends to the last `size` tokens, itself among them, and to the sinks.

    A layer with a smaller window of its own keeps that one and gets no sinks. A sink that has
    left the window is seen at the distance that it has in a full cache of sinks and window.

    Attributes:
        size: tokens that a query sees.
        num_sinks: first tokens of the document that stay visible.
        kept: rows that are kept before a segment; at least `size - 1`, which is the default.
    """

    size: int
    num_sinks: int = 0
    kept: int = -1

    def __post_init__(self) -> None:
        if self.kept < 0:
            object.__setattr__(self, "kept", self.size - 1)  # a query sees itself too

    def empty(
        self, batch_size: int, own: AttentionSizes, dtype: torch.dtype, device: torch.device,
        *, sizes: Tensor | None = None,
    ) -> Tree:  # fmt: skip
        """What a layer keeps before the first token; `sizes` `(B,)` are windows of the rows' own,
        none larger than `size`."""
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        tree: Tree = {"tokens": torch.zeros(batch_size, dtype=torch.long, device=device)}
        if sizes is not None:
            tree["sizes"] = sizes.to(device)
        for name, count in (("window", self.kept), ("sink", self.num_sinks)):
            shape = (batch_size, own.num_kv_heads, count)
            tree[f"{name}_key"] = torch.zeros(*shape, own.key_dim, **make)
            tree[f"{name}_value"] = torch.zeros(*shape, own.value_dim, **make)
        return tree

    def rows(self, attention: LayerAttention, state: Tree) -> tuple[list[Rows], Tensor]:
        """The rows before the segment, and who sees whom inside it, `(B, T, K)`."""
        places, before = attention.places, state["tokens"]
        window = self._seen(attention, state)
        positions = torch.arange(-self.kept, 0, device=before.device).expand(len(before), -1)
        recent = places.queries[:, :, None] - positions[:, None] < window
        recent &= right_valid(before, self.kept)[:, None]
        rows = [Rows(state["window_key"], state["window_value"], positions, recent, still=True)]
        if self.num_sinks and attention.window is None:
            rows.insert(0, self._sink_rows(attention, state, window))
        return rows, places.queries[:, :, None] - places.keys[:, None] < window

    def closed(
        self, attention: LayerAttention, state: Tree, beside: dict[str, Tensor] | None = None
    ) -> Tree:
        """What is kept once the segment is part of the past; `beside` keys and values rows
        `(B, H, K, D)` of the segment for other buffers of `kept` rows in the state."""
        before, valid = state["tokens"], attention.places.key_valid
        tokens = before + valid.sum(1)
        kept = latest(torch.cat([right_valid(before, self.kept), valid], 1), self.kept)
        there = right_valid(tokens, self.kept)
        new = {**state, "tokens": tokens}
        own = {"window_key": attention.key, "window_value": attention.value}
        for name, rows in (own | (beside or {})).items():
            new[name] = take(torch.cat([state[name], rows.to(state[name])], 2), kept, there)
        return new | self._sinks(attention, state)

    def leaving(self, attention: LayerAttention, state: Tree) -> Leaving:
        """What leaves the window at each query of the step; needs `kept` of at least `size`."""
        valid, mask = attention.places.key_valid, attention.places.query_valid
        rank = (valid.long().cumsum(1) - 1)[:, valid.shape[1] - mask.shape[1] :].clamp_min(0)
        sizes = state["sizes"][:, None] if "sizes" in state else self.size
        column = rank - sizes  # of the valid ones; negative for those before the segment
        columns = earliest(valid, valid.shape[1]).gather(1, column.clamp_min(0))
        kept = (column + self.kept).clamp_max(self.kept - 1)
        places = state["tokens"][:, None] + rank
        return Leaving(places, places - sizes, kept, columns, column >= 0)

    def _seen(self, attention: LayerAttention, state: Tree) -> Tensor | int:
        """Tokens that a query sees, itself among them; `(B, 1, 1)` where rows differ."""
        most = self.size if attention.window is None else min(self.size, attention.window)
        return state["sizes"][:, None, None].clamp_max(most) if "sizes" in state else most

    def _sinks(self, attention: LayerAttention, state: Tree) -> Tree:
        """Keys and values of the document's first tokens, those just read among them."""
        before, valid = state["tokens"], attention.places.key_valid
        places = torch.arange(self.num_sinks, device=before.device)
        index = earliest(torch.cat([places < before[:, None], valid], 1), self.num_sinks)
        there = places < (before + valid.sum(1))[:, None]
        return {
            name: take(torch.cat([state[name], new.to(state[name].dtype)], 2), index, there)
            for name, new in (("sink_key", attention.key), ("sink_value", attention.value))
        }

    def _sink_rows(self, attention: LayerAttention, state: Tree, window: Tensor | int) -> Rows:
        """The sinks as queries see them that have left them behind the window."""
        sinks = self._sinks(attention, state)
        absolute = state["tokens"][:, None] + attention.places.queries
        places = torch.arange(self.num_sinks, device=absolute.device)
        last = window + self.num_sinks - 1
        return Rows(
            sinks["sink_key"],
            sinks["sink_value"],
            places.expand(len(absolute), -1),
            absolute[:, :, None] - places >= window,
            query_positions=absolute.clamp_max(last[:, 0] if isinstance(last, Tensor) else last),
        )
