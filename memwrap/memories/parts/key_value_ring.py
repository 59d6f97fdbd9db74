"""Keys and values of the past in a ring for each KV head, in layers that a memory chose.

A layer's tree holds `key` `(B, Hkv, C, Dk)`, `value` `(B, Hkv, C, Dv)` and `count` `(B,)`, the
entries that were ever written. C grows with what is read until it is `size`; then the oldest goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.ops.buffers import filled, ring
from memwrap.state.trees import Tree


@dataclass(frozen=True)
class KeyValueRings:
    """Rings of `size` entries in layers, given as `{number: heads and widths}`."""

    size: int
    layers: dict[int, AttentionSizes]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> float:
        """What an entry takes in all layers, until the rings are full."""
        numbers = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in self.layers.values())
        return numbers * self.dtype.itemsize

    def empty(self, batch_size: int, device: torch.device) -> Tree:
        """Make a memory's state before the first token."""
        make: dict[str, Any] = {"device": device, "dtype": self.dtype}
        layers: Tree = {}
        for layer, dims in self.layers.items():
            shape = (batch_size, dims.num_kv_heads, 0)
            layers[str(layer)] = {
                "key": torch.zeros(*shape, dims.key_dim, **make),
                "value": torch.zeros(*shape, dims.value_dim, **make),
                "count": torch.zeros(batch_size, dtype=torch.long, device=device),
            }
        return {"layers": layers}

    def ranges(self, state: Tree) -> Iterator[tuple[Tensor, int, int]]:
        """Say what the counts in a memory's state may be."""
        for tree in state["layers"].values():
            yield tree["count"], 0, ring.most_counted(tree["key"].shape[2], self.size)

    def filled(self, state: Tree) -> Tensor:
        """Tell which slots of a layer hold an entry, `(B, C)` bool."""
        return filled(state["count"], state["key"].shape[2])

    def add(self, state: Tree, key: Tensor, value: Tensor, valid: Tensor) -> Tree:
        """Add entries to a layer's tree: keys `(B, Hkv, K, Dk)`, values `(B, Hkv, K, Dv)`, those
        that `valid` `(B, K)` names."""
        count, total = state["count"], state["count"] + valid.sum(1)
        place = ring.slots(count, valid, self.size)
        capacity = ring.capacity(total, state["key"].shape[2], self.size)
        return {
            "key": ring.store(state["key"], place, key, capacity),
            "value": ring.store(state["value"], place, value, capacity),
            "count": total,
        }
