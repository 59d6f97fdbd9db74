"""Neurocache: compressed hidden states, read by small attentions (Safaya and Yuret 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.backbones import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.matrices import matrix_of
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers, check_attention, three_quarters
from memwrap.ops import neurocache as ops
from memwrap.ops import retrieve
from memwrap.ops.buffers import filled, least_used, ring
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


class NeurocacheConfig(MemoryConfig):
    """Inputs of chosen layers' self-attention are compressed and cached; every token retrieves
    once, and small attentions beside the model's own read what it and its last neighbours found.

    Examples:
        >>> import memwrap
        >>> memwrap.NeurocacheConfig(top_k=8).compression_factor
        4

    Attributes:
        cache_size: compressed states that are kept; when they are full one goes for each new one.
        eviction: `"fifo"`: the oldest goes; `"lru"`: the one that was retrieved longest ago (it or
            a neighbour of it), which costs a copy of the cache at the end of every segment.
        compression_factor: states are so many times narrower than hidden states; 1: not compressed.
        top_k: hits of a token.
        neighborhood_size: states that are read for each hit, in time around it; 1 or even. At 2
            the hit and the state after it.
        context_size: a token reads what so many last tokens retrieved, itself among them.
        similarity: `"l2"` or `"dot"`.
        layers: layers that store and retrieve (`None`: one, at three quarters of the depth).
        attention_layers: layers with a cache attention (`None`: the first of `layers` and all
            behind it); each reads what the last layer of `layers` before it retrieved.
        head_layout: `"heads"`, or `"published"`, a reshape in the public code that mixes states
            with heads; checkpoints trained with that code need it.
        compat: the public code's other habits: empty places take part as zeros and are told by
            their sum, neighbours do not cross the ring's seam, context before a segment repeats
            its first token, search is approximate beyond 512 states, nothing flows back into
            what was stored, and in training retrieved states are compressed anew.
    """

    name: ClassVar[str] = "neurocache"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"top_k", "neighborhood_size"})

    cache_size: PositiveInt = 16384
    compression_factor: PositiveInt = 4
    top_k: PositiveInt = 16
    neighborhood_size: PositiveInt = 2
    context_size: PositiveInt = 2
    similarity: Literal["l2", "dot"] = "l2"
    eviction: Literal["fifo", "lru"] = "fifo"
    layers: LayerList | None = None
    attention_layers: LayerList | None = None
    head_layout: ops.Layout = "heads"
    compat: bool = False

    def validate_neighborhood(self) -> None:
        if self.neighborhood_size > 1 and self.neighborhood_size % 2:
            self.refuse("neighborhood_size", "1 or an even number")

    def validate_buckets(self) -> None:
        buckets = min(max(self.top_k, 512), self.cache_size)
        if self.compat and (self.cache_size % buckets or self.top_k > self.cache_size):
            self.refuse("cache_size", f"a multiple of {buckets} and at least top_k with `compat`")

    @classmethod
    def tiny(cls) -> NeurocacheConfig:
        return cls(
            segment_size=8, cache_size=20, compression_factor=2, top_k=3, layers=[0],
            attention_layers=[0, 1],
        )  # fmt: skip


@dataclass
class RetrievedStates:
    """The entries that the tokens of a step retrieved, for all cache attentions; see
    `ops.attend`."""

    states: Tensor
    valid: Tensor
    column: Tensor
    context_valid: Tensor


class CacheAttention(nn.Module):
    """The attention of one layer to retrieved states. Its output starts at zero."""

    def __init__(self, heads: int, kv_heads: int, width: int, sizes: Sizes, state: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        make: dict[str, Any] = {"bias": False, "dtype": sizes.dtype, "device": sizes.device}
        self.q_proj = nn.Linear(sizes.hidden_size, heads * width, **make)
        self.k_proj = nn.Linear(state, kv_heads * width, **make)
        self.v_proj = nn.Linear(state, kv_heads * width, **make)
        self.o_proj = nn.Linear(heads * width, sizes.hidden_size, **make)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(self.o_proj.weight)

    def forward(self, hidden: Tensor, retrieved: RetrievedStates, layout: str) -> Tensor:
        """Compute what is added to the self-attention's output `(B, T, D)`, for its input
        `hidden`."""
        dtype = self.q_proj.weight.dtype
        query = self.q_proj(hidden.to(dtype)).unflatten(-1, (self.heads, self.width))
        key, value = (
            matrix_of(layer).unflatten(0, (self.kv_heads, self.width))
            for layer in (self.k_proj, self.v_proj)
        )
        out = ops.attend(
            query * self.width**-0.5, retrieved.states.to(dtype), retrieved.valid, retrieved.column,
            retrieved.context_valid, key, value, layout=layout,
        )  # fmt: skip
        return self.o_proj(out.flatten(2))


@register(NeurocacheConfig)
class NeurocacheMemory(AttentionMemory):
    """Per storing layer a ring of compressed states, which grows with what is read until
    `cache_size` are there. A segment retrieves from the cache as it was before it, and its own
    states are added when it closes."""

    claims = Claims(neutral_start=True, bounded=False, lengthens=True)

    config: NeurocacheConfig
    needs_hidden = True

    def __init__(self, config: NeurocacheConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        one = config.layers is None
        self.storing = [three_quarters(sizes)] if one else attending_layers(config, sizes)
        reading = config.attention_layers
        self.reading = sorted(reading or (n for n in sizes.attention if n >= self.storing[0]))
        if not self.storing[0] <= self.reading[0] <= self.reading[-1] < sizes.num_layers:
            raise ValueError(
                f"NeurocacheConfig.attention_layers are {self.reading}; they must be from the "
                f"first retrieving layer {self.storing[0]} to the last, {sizes.num_layers - 1}."
            )
        check_attention(config, "attention_layers", self.reading, sizes)
        if sizes.hidden_size % config.compression_factor:
            raise ValueError(
                f"NeurocacheConfig.compression_factor is {config.compression_factor}; it must "
                f"divide the backbone's width {sizes.hidden_size}."
            )
        self.width = sizes.hidden_size // config.compression_factor
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        self.h_proj: nn.Module = nn.Identity()
        self.h_norm: nn.Module = nn.Identity()
        if config.compression_factor > 1:
            self.h_proj = nn.Linear(sizes.hidden_size, self.width, bias=False, **make)
            nn.init.trunc_normal_(self.h_proj.weight, std=sizes.hidden_size**-0.5)
            self.h_norm = nn.LayerNorm(self.width, **make)
        self.cache_attns = nn.ModuleDict()
        for layer in self.reading:
            dims = sizes.attention[layer]
            self.cache_attns[str(layer)] = CacheAttention(
                dims.num_heads, dims.num_kv_heads, dims.key_dim, sizes, self.width
            )

    @property
    def reencodes(self) -> bool:
        """Whether uncompressed states are kept too."""
        return self.config.compat and self.config.compression_factor > 1

    @property
    def bytes_per_token(self) -> float:  # type: ignore[override]
        """What a state takes in all storing layers, until the cache is full."""
        width = self.width + self.reencodes * self.sizes.hidden_size
        return len(self.storing) * width * self.sizes.backbone_dtype.itemsize

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        make: dict[str, Any] = {"device": device, "dtype": self.sizes.backbone_dtype}
        layers: Tree = {}
        for layer in sorted({*self.storing, *self.reading}):
            tree = {"count": torch.zeros(batch_size, dtype=torch.long, device=device)}
            if layer in self.storing:
                tree["states"] = torch.zeros(batch_size, 1, 0, self.width, **make)
                if self.config.eviction == "lru":
                    unused = tree["count"].new_full((batch_size, self.config.cache_size), -1)
                    tree["last_used"] = unused
                if self.reencodes:
                    tree["raw"] = torch.zeros(batch_size, 1, 0, self.sizes.hidden_size, **make)
            layers[str(layer)] = tree
        return {"layers": layers}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield tree["count"], *progress.closed
            if "states" in tree:
                most = ring.most_counted(tree["states"].shape[2], self.config.cache_size)
                yield tree["count"], 0, most
            if "last_used" in tree:
                yield tree["last_used"], -1, tree["count"]

    def compress(self, hidden: Tensor) -> Tensor:
        """Compress hidden states `(..., D)` to `(..., d)`."""
        if self.config.compression_factor == 1:
            return hidden
        projection: Any = self.h_proj
        with torch.autocast(hidden.device.type, enabled=False):
            return self.h_norm(projection(hidden.to(projection.weight.dtype)))

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        if "states" in state:
            retrieved, used = self._retrieve(attention, state)
            attention.notes[self.config.name], state = retrieved, {**state, **used}
        if layer in self.reading:
            retrieved = attention.notes[self.config.name]
            with torch.autocast(attention.value.device.type, enabled=False):
                cache_attention: Any = self.cache_attns[str(layer)]
                attention.add(cache_attention(attention.inputs, retrieved, self.config.head_layout))
        return attention.local(), state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        count, valid, size = state["count"], attention.key_valid, self.config.cache_size
        total = count + valid.sum(1)
        if "states" not in state:
            return {"count": total}
        hidden: Tensor = attention.hidden  # type: ignore[assignment]
        if self.config.compat:
            hidden = hidden.detach()
            with torch.no_grad():
                new = self.compress(hidden)
        else:
            new = self.compress(hidden)
        capacity = ring.capacity(total, state["states"].shape[2], size)
        rows = {"states": new, "raw": hidden}
        rows = {name: rows[name][:, None] for name in rows.keys() & state.keys()}
        if "last_used" in state:
            old, slot, used = least_used.replace(state["last_used"], count, valid)
            kept = {
                name: least_used.store(state[name], old, slot, more, capacity)
                for name, more in rows.items()
            }
            return {"count": total, "last_used": used, **kept}
        slot = ring.slots(count, valid, size)
        kept = {n: ring.store(state[n], slot, more, capacity) for n, more in rows.items()}
        return {"count": total, **kept}

    def _retrieve(self, attention: LayerAttention, state: Tree) -> tuple[RetrievedStates, Tree]:
        """Retrieve once for every token of the step, and for those before it that it reads with;
        and what the state notes of it."""
        config = self.config
        column, context_valid = ops.context(
            attention.query_positions, attention.key_positions, attention.key_valid,
            config.context_size, clamp=config.compat,
        )  # fmt: skip
        hidden: Tensor = attention.hidden  # type: ignore[assignment]
        needed = torch.zeros(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        needed[column.flatten()] = True
        rank = needed.long().cumsum(0) - 1
        with torch.no_grad():
            query = self.compress(hidden[:, needed])
        find = self._published if config.compat else self._found
        states, valid, place = find(query, state)
        noted: Tree = {}
        if "last_used" in state:
            real = attention.key_valid[:, needed, None] & valid
            noted["last_used"] = least_used.mark(state["last_used"], place, real, state["count"])
        return RetrievedStates(states, valid, rank[column], context_valid), noted

    def _found(self, query: Tensor, state: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """Take the retrieved states `(B, M, N, d)`, which are there, and their slots."""
        config, count, cache = self.config, state["count"], state["states"]
        capacity = cache.shape[2]
        index = retrieve.search(
            query[:, None], cache, filled(count, capacity), config.top_k,
            similarity=config.similarity,
        )[1][:, 0]  # fmt: skip
        if index.shape[-1] == 0:
            shape = (*index.shape[:2], 0)
            none = index.new_zeros(shape, dtype=torch.bool)
            return query.new_zeros(*shape, self.width), none, index.new_zeros(shape)
        # Kept by use, entries stand in order from the first slot on.
        last = count.clamp_max(config.cache_size) if "last_used" in state else count
        numbers = ring.entries(last, capacity, config.cache_size)
        hits = numbers.gather(1, index.clamp_min(0).flatten(1)).view(index.shape)
        number = ops.neighbours(hits, config.neighborhood_size)
        oldest = (last - config.cache_size).clamp_min(0)[:, None, None]
        valid = (number >= oldest) & (number < last[:, None, None])
        valid &= (index >= 0).repeat_interleave(config.neighborhood_size, -1)
        place = torch.where(valid, number % config.cache_size, 0)
        return retrieve.gather(cache, place[:, None])[:, 0], valid, place

    def _published(self, query: Tensor, state: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """Retrieve as the public code does: a cache of zeros, clipped at its ends."""
        config = self.config
        missing = config.cache_size - state["states"].shape[2]
        cache = nn.functional.pad(state["states"], (0, 0, 0, missing))
        index = ops.search_buckets(
            query.to(cache.dtype), cache[:, 0], config.top_k, config.similarity
        )
        place = ops.neighbours(index, config.neighborhood_size).clamp(0, config.cache_size - 1)
        states = retrieve.gather(cache, place[:, None])[:, 0]
        if self.training and self.reencodes:
            raw = nn.functional.pad(state["raw"], (0, 0, 0, missing))
            states = self.compress(retrieve.gather(raw, place[:, None])[:, 0])
        return states, torch.ones_like(place, dtype=torch.bool), place
