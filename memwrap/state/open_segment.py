"""OpenSegment: what waits of each row's segment until it is full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memwrap.state.trees import Tree, tree_map, tree_to


@dataclass(frozen=True)
class OpenSegment:
    """The K columns of the rows' open segments.

    Attributes:
        tree: keys and values by layer, `(B, Hkv, K, D)`, and what memories look at of the tokens,
            `(B, 1, K, D)`; empty where nothing is kept.
        positions: `(B, K)` the order in the segment.
        valid: `(B, K)` bool; False is padding.
        tokens: `(B, K)` how many tokens the segment has up to a column and with it; none at a
            prefix, one number at a token and at what is inserted behind it.
        noted: a memory, or a recurrent layer of the backbone, wrote down something while these
            columns were read: they cannot be dropped as if they had not been.
    """

    tree: Tree
    positions: Tensor
    valid: Tensor
    tokens: Tensor
    noted: bool = False

    @classmethod
    def empty(cls, batch_size: int) -> OpenSegment:
        """Make rows with nothing open."""
        nothing = torch.zeros(batch_size, 0, dtype=torch.long)
        return cls({}, nothing, nothing.bool(), nothing)

    def __len__(self) -> int:
        return self.valid.shape[1]

    def map(
        self, tensors: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]
    ) -> OpenSegment:
        """Apply `tensors` to the tree and `rows` to what says where its columns stand."""
        positions, valid, tokens = map(rows, (self.positions, self.valid, self.tokens))
        return OpenSegment(tree_map(tensors, self.tree), positions, valid, tokens, self.noted)

    def detach(self) -> OpenSegment:
        """Copy it without its graph."""
        return replace(self, tree=tree_map(Tensor.detach, self.tree))

    def to(self, device: torch.device | str) -> OpenSegment:
        """Copy it with its tree on another device; positions stay on the CPU."""
        return replace(self, tree=tree_to(self.tree, device))

    def after(self, closes: Tensor) -> OpenSegment:
        """Drop the rows that `closes` `(B,)` names, and columns that no other row needs."""
        return self._only(self.valid & ~closes[:, None])

    def cropped(self, fill: Tensor) -> OpenSegment:
        """Keep the first `fill` `(B,)` tokens of each row, and a prefix with any of them."""
        return self._only(self.valid & (self.tokens <= fill[:, None]) & (fill > 0)[:, None])

    def _only(self, valid: Tensor) -> OpenSegment:
        used = valid.any(0)
        if not bool(used.any()):
            return OpenSegment.empty(len(valid))
        kept = replace(self, valid=valid)
        if bool(used.all()):
            return kept
        columns = used.nonzero().squeeze(1)
        return kept.map(lambda t: t.index_select(2, columns.to(t.device)), lambda t: t[:, columns])

    @staticmethod
    def cat(segments: list[OpenSegment]) -> OpenSegment:
        """Put the rows of several into one batch; shorter ones get padding behind."""
        length = max(map(len, segments))
        padded = [segment._padded(length) for segment in segments]
        like = next((segment.tree for segment in padded if segment.tree), {})
        trees = [segment.tree or _zeros(like, len(segment.valid)) for segment in padded]
        return OpenSegment(
            tree_map(lambda *t: torch.cat(t), *trees) if like else {},
            torch.cat([segment.positions for segment in padded]),
            torch.cat([segment.valid for segment in padded]),
            torch.cat([segment.tokens for segment in padded]),
            any(segment.noted for segment in padded),
        )

    def _padded(self, length: int) -> OpenSegment:
        extra, pad = length - len(self), torch.nn.functional.pad
        if not extra:
            return self
        return self.map(lambda t: pad(t, (0, 0, 0, extra)), lambda t: pad(t, (0, extra)))

    def cache(self) -> DynamicCache:
        """Fill a cache with the keys and values."""
        cache = DynamicCache()
        if self.tree:
            keys, values = self.tree["keys"], self.tree["values"]
            for index in sorted(keys, key=int):
                cache.update(keys[index], values[index], int(index))
        return cache


def _zeros(tree: Tree, rows: int) -> Tree:
    return tree_map(lambda t: t.new_zeros(rows, *t.shape[1:]), tree)


def keys_and_values(cache: DynamicCache) -> Tree:
    """Take the tree of an `OpenSegment` out of the cache that it filled."""
    layers: Any = {
        str(i): layer
        for i, layer in enumerate(cache.layers)
        if getattr(layer, "is_initialized", False)
    }
    return {
        "keys": {name: layer.keys for name, layer in layers.items()},
        "values": {name: layer.values for name, layer in layers.items()},
    }
