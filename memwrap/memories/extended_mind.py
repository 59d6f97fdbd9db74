"""Extended Mind: documents given to a model as keys and values that its attention looks up.

Klett and Ahle 2024 (Extended Mind Transformers). Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.joint_softmax import merge_attention_states
from memwrap.memories.parts.key_value_ring import KeyValueRings
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, PositiveInt, Range
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import retrieve
from memwrap.ops.buffers import ring
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree

_notes: ContextVar[list[Retrieved] | None] = ContextVar("memwrap_retrieved", default=None)


class ExtendedMindConfig(MemoryConfig):
    """In every layer each query attends, in one softmax, to its own segment and to the `top_k` most
    similar entries of what was read before.

    Give it documents with `memwrap.Library.encode`, or by reading them (`model.read`).

    Examples:
        >>> import memwrap
        >>> memwrap.ExtendedMindConfig(top_k=5).cache_size
        100000

    Attributes:
        cache_size: entries kept for each KV head; when they are full the oldest goes.
        top_k: entries that a query attends to, per head and layer.
        similarity_threshold: entries whose cosine similarity is no greater are left out; None for
            no limit. 0.25 is the published value.
        positions: `"zero"`, as published: queries rotated to their place in the segment, all
            entries as if at its first place. `"none"`: neither is rotated, so that how far into its
            segment a query stands does not matter.
        layers: decoder layers that look things up (`None`: all).
    """

    name: ClassVar[str] = "extended_mind"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"top_k", "similarity_threshold"})

    segment_size: PositiveInt = 1024
    cache_size: PositiveInt = 100_000
    top_k: PositiveInt = 10
    similarity_threshold: Annotated[float, Range(-1, 1)] | None = None
    positions: Literal["zero", "none"] = "zero"
    layers: LayerList | None = None

    @classmethod
    def tiny(cls) -> ExtendedMindConfig:
        return cls(segment_size=8, cache_size=20, top_k=3)


@dataclass
class Retrieved:
    """The entries that the queries of one step read in one layer.

    Attributes:
        layer: its number.
        entries: `(B, H, T, k)` numbers of entries, counted from the first that was written; -1 for
            none.
        weights: `(B, H, T, k)` of the layer's attention; what is missing to 1 went to the segment.
    """

    layer: int
    entries: Tensor
    weights: Tensor


GIVEN = "given"
"""In a state: entries of a library, which were there before anything was read."""


@contextmanager
def retrieved() -> Iterator[list[Retrieved]]:
    """Collect what is read inside the block, in the order in which layers and steps run."""
    notes: list[Retrieved] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


@register(ExtendedMindConfig)
class ExtendedMindMemory(AttentionMemory):
    """Per layer a ring of keys (as at place 0) and of values for each KV head. It grows with what
    is read until `cache_size` entries are there. There are no parameters."""

    claims = Claims(neutral_start=True, bounded=False, lengthens=True)

    config: ExtendedMindConfig

    def __init__(self, config: ExtendedMindConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.chosen = attending_layers(config, sizes)

    @property
    def rings(self) -> KeyValueRings:
        """The rings of the chosen layers, in the backbone's dtype."""
        dims = {layer: self.sizes.attention[layer] for layer in self.chosen}
        return KeyValueRings(self.config.cache_size, dims, self.sizes.backbone_dtype)

    @property
    def bytes_per_token(self) -> float:  # type: ignore[override]
        return self.rings.bytes_per_token

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        given = torch.zeros(batch_size, dtype=torch.long, device=device)
        return {**self.rings.empty(batch_size, device), GIVEN: given}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        yield from self.rings.ranges(state)
        given, (least, most) = state[GIVEN], (n.to(state[GIVEN]) for n in progress.closed)
        for tree in state["layers"].values():
            yield tree["count"], least + given, most + given
            yield given, 0, tree["count"]

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        config = self.config
        if state["key"].shape[2] == 0:
            return attention.local(), state
        if config.positions == "zero":
            query, scale = attention.rotated_query, attention.rotated_scaling
        else:
            query, scale = attention.query, attention.scaling
        with torch.autocast(query.device.type, enabled=False):
            read = retrieve.attend(
                query, state["key"], state["value"], self.rings.filled(state), config.top_k,
                scale=scale, similarity="cosine", threshold=config.similarity_threshold,
                softcap=attention.softcap,
            )  # fmt: skip
        most = read.index.shape[-1]
        out, share = merge_attention_states(attention, read.out, read.logsumexp, most)
        notes = _notes.get()
        if notes is not None:
            number = ring.entries(state["count"], state["key"].shape[2], config.cache_size)
            index = read.index.clamp_min(0).flatten(1)
            entries = number.gather(1, index).view(read.index.shape)
            weights = read.weights * share[..., None]
            notes.append(Retrieved(layer, entries.masked_fill(read.index < 0, -1), weights))
        return out, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        key, value = attention.key, attention.value
        if self.config.positions == "zero":
            zeros = torch.zeros_like(attention.key_positions)
            key = attention.rotate(key, zeros, (self, "zero"))
        return self.rings.add(state, key, value, attention.key_valid)
