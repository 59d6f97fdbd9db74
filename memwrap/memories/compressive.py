"""Compressive memory: recent rows, then compressed older ones (Rae et al. 2019), retrofitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, NonNegativeFloat, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import compressive as ops
from memwrap.ops.buffers import take
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.ops.buffers.right_aligned import latest, right_valid
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree

PARTS = ("memory", "compressed")


class CompressiveConfig(MemoryConfig):
    """The last `memory_size` rows of every layer stay as they are; older ones are compressed
    `compression_rate` to one and the last `compressed_size` of those kept.

    Examples:
        >>> import memwrap
        >>> memwrap.CompressiveConfig(memory_size=256).compression_rate
        4

    Attributes:
        memory_size: n_m, uncompressed rows.
        compressed_size: n_cm, compressed rows.
        compression_rate: c.
        compression: `"mean"` or `"max"` pooling and `"most_used"` (the rows that got the most
            attention stay) have nothing to train; `"conv"` and `"dilated_conv"` are learned and
            start as mean pooling.
        store: `"kv"`, un-rotated keys and values, or `"hidden"`, the attention's inputs, which
            are projected again at every read (they follow a W_k and W_v in training).
        positions: a row's place: `"index"`, one place a row, which stays in the trained range, or
            `"timeline"`, the mean place of what it was made of.
        loss: what teaches a convolution: `"attention"` reconstruction or `"autoencoding"`.
        loss_weight: of that loss, a mean per token, beside the language model's.
        bptt_segments: 1 by default, as published: the memory is a constant for gradients.
        layers: decoder layers that have a memory (`None`: all).
    """

    name: ClassVar[str] = "compressive"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"loss_weight"})

    memory_size: PositiveInt = 512
    compressed_size: PositiveInt = 512
    compression_rate: PositiveInt = 4
    compression: ops.Compression = "mean"
    store: Literal["kv", "hidden"] = "kv"
    positions: Literal["index", "timeline"] = "index"
    loss: Literal["attention", "autoencoding"] = "attention"
    loss_weight: NonNegativeFloat = 1.0
    bptt_segments: PositiveInt | None = 1
    layers: LayerList | None = None

    @property
    def learned(self) -> bool:
        """Whether the compression has parameters."""
        return self.compression in ("conv", "dilated_conv")

    @classmethod
    def tiny(cls) -> CompressiveConfig:
        return cls(
            segment_size=8, memory_size=6, compressed_size=5, compression_rate=2, bptt_segments=None
        )


class Compressor(nn.Module):
    """A convolution over time for one kind of rows, and the autoencoder's decoder if wanted."""

    def __init__(self, config: CompressiveConfig, heads: int, width: int, sizes: Sizes) -> None:
        super().__init__()
        shape = (heads, width, width, config.compression_rate)
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        mean = torch.eye(width, **make)[None, :, :, None] / config.compression_rate
        self.weight = nn.Parameter(mean.expand(shape).clone())
        self.bias = nn.Parameter(torch.zeros(heads, width, **make))
        if config.loss == "autoencoding":
            copies = torch.eye(width, **make)[None, :, :, None].expand(shape)
            self.decoder_weight = nn.Parameter(copies.clone())
            self.decoder_bias = nn.Parameter(torch.zeros(heads, width, **make))


@register(CompressiveConfig)
class CompressiveMemory(AttentionMemory):
    """Per layer two row buffers, filled from the right: `memory` and `compressed`.

    A segment attends to `[compressed; memory; segment]` in one softmax. When it closes, the
    oldest rows of `[memory; segment]` beyond n_m leave in blocks of c and are compressed.
    """

    claims = Claims(neutral_start=True)

    config: CompressiveConfig

    def __init__(self, config: CompressiveConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.needs_hidden = config.store == "hidden"
        # Rows that do not fill a block of c wait uncompressed.
        self.capacity = config.memory_size + config.compression_rate - 1
        self.chosen = attending_layers(config, sizes)
        self.compressors = nn.ModuleDict()
        if config.learned:
            for layer in self.chosen:
                compressors = {n: Compressor(config, h, d, sizes) for n, h, d in self._kinds(layer)}
                self.compressors[str(layer)] = nn.ModuleDict(compressors)

    def _kinds(self, layer: int) -> list[tuple[str, int, int]]:
        """List `(name, heads, width)` of what is stored for a row."""
        dims = self.sizes.attention[layer]
        if self.config.store == "hidden":
            return [("hidden", 1, self.sizes.hidden_size)]
        heads = dims.num_kv_heads
        return [("key", heads, dims.key_dim), ("value", heads, dims.value_dim)]

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        layers: Tree = {}
        for layer in self.chosen:
            tree: Tree = {}
            for part, size in zip(PARTS, (self.capacity, self.config.compressed_size), strict=True):
                tree[part] = {
                    name: torch.zeros(
                        batch_size, heads, size, width,
                        dtype=self.sizes.backbone_dtype, device=device,
                    )
                    for name, heads, width in self._kinds(layer)
                }  # fmt: skip
                tree[part]["place"] = torch.zeros(batch_size, size, 1, device=device)
                tree[part]["count"] = torch.zeros(batch_size, dtype=torch.long, device=device)
            if self.config.compression == "most_used":
                size = self.capacity + self.config.segment_size
                tree["usage"] = torch.zeros(batch_size, size, device=device)
            layers[str(layer)] = tree
        return {"layers": layers}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield tree["memory"]["count"], 0, self.capacity
            yield tree["compressed"]["count"], 0, self.config.compressed_size

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        parts = [self._key_values(attention, state, part) for part in reversed(PARTS)]
        counting = "usage" in state  # then places differ from layer to layer
        name = None if counting else ("compressive", self)
        out, weights = attention.join(*parts, weights=counting, name=name)
        if counting and weights is not None:
            state = {**state, "usage": state["usage"] + self._usage(attention, weights)}
        return out, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        memory, config = state["memory"], self.config
        new = self._segment(attention)
        valid = torch.cat([right_valid(memory["count"], self.capacity), attention.key_valid], 1)
        pool = {n: torch.cat([memory[n], x.to(memory[n].dtype)], -2) for n, x in new.items()}
        order = earliest(valid, valid.shape[1])
        pool = {n: take(x, order) for n, x in pool.items()}
        total = valid.sum(1)
        rate = config.compression_rate
        evicted = (total - config.memory_size).clamp_min(0) // rate * rate
        most = valid.shape[1] // rate * rate  # a row of the batch can let go of so many
        old = {n: x[..., :most, :] for n, x in pool.items()}
        fresh, made = self._compress(layer, old, evicted, state, order, attention.key_positions)
        if self.training and config.learned and attention.query.shape[2]:
            self._teach(layer, attention, old, fresh, evicted)
        result: Tree = {
            "compressed": self._pushed(state["compressed"], fresh, made, config.compressed_size),
            "memory": self._left(pool, evicted, total),
        }
        # From here on places are counted from the next segment's start.
        length = attention.key_valid.sum(1)
        for part in PARTS:
            count, place = result[part]["count"], result[part]["place"]
            valid_rows = right_valid(count, place.shape[1])[..., None]
            result[part]["place"] = (place - length[:, None, None]) * valid_rows
        if "usage" in state:
            result["usage"] = torch.zeros_like(state["usage"])
        return result

    def _key_values(self, attention: LayerAttention, state: Tree, part: str) -> MemoryKeyValues:
        buffer = state[part]
        visible = right_valid(buffer["count"], buffer["place"].shape[1])
        if self.config.positions == "timeline":
            positions = buffer["place"].squeeze(-1)
        else:
            size = buffer["place"].shape[1]
            positions = torch.arange(-size, 0, device=visible.device).expand(visible.shape)
            if part == "compressed":
                positions = positions - state["memory"]["count"][:, None]
        keys, values = buffer.get("key"), buffer.get("value")
        static = keys is not None  # both change only where a segment closes
        if keys is None:
            keys, values = attention.project(buffer["hidden"].squeeze(1))
        return MemoryKeyValues(keys, values, positions, visible, static=static)

    def _segment(self, attention: LayerAttention) -> Tree:
        """Return the segment's rows as they are stored, and their places `(B, K, 1)`."""
        place = attention.key_positions[..., None].float()
        if attention.hidden is not None:
            return {"hidden": attention.hidden[:, None], "place": place}
        return {"key": attention.key, "value": attention.value, "place": place}

    def _compress(
        self, layer: int, old: Tree, evicted: Tensor, state: Tree, order: Tensor, places: Tensor
    ) -> tuple[Tree, Tensor]:
        """Compress rows, from the left; also gives how many of each batch row count."""
        config = self.config
        rate, kind = config.compression_rate, config.compression
        if kind == "most_used":
            size = old["place"].shape[1]
            usage = self._usage_of_pool(state["usage"], places).gather(1, order)
            index, keep = ops.most_used(usage[:, :size], evicted, rate)
            return {n: take(x, index) for n, x in old.items()}, keep
        fresh: Tree = {"place": ops.compress(old["place"][:, None], rate, "mean")[:, 0]}
        for name in old.keys() - fresh.keys():
            weights: dict[str, Any] = {}
            if config.learned:
                compressor: Any = self.compressors[str(layer)][name]  # type: ignore[index]
                dtype = old[name].dtype
                weights = {"weight": compressor.weight.to(dtype), "bias": compressor.bias.to(dtype)}
            fresh[name] = ops.compress(old[name], rate, kind, **weights)
        return fresh, evicted // rate

    def _pushed(self, buffer: Tree, fresh: Tree, made: Tensor, size: int) -> Tree:
        """Append rows to a buffer and drop the oldest."""
        count = next(iter(fresh.values())).shape[-2]
        made_valid = torch.arange(count, device=made.device) < made[:, None]
        index = latest(torch.cat([right_valid(buffer["count"], size), made_valid], 1), size)
        total = (buffer["count"] + made).clamp_max(size)
        valid = right_valid(total, size)
        new = {
            n: take(torch.cat([buffer[n], x.to(buffer[n].dtype)], -2), index, valid)
            for n, x in fresh.items()
        }
        return {**new, "count": total}

    def _left(self, pool: Tree, evicted: Tensor, total: Tensor) -> Tree:
        """Take the uncompressed memory: what of the pool was not evicted."""
        place = torch.arange(pool["place"].shape[1], device=total.device)
        stays = (place >= evicted[:, None]) & (place < total[:, None])
        index = latest(stays, self.capacity)
        count = total - evicted
        valid = right_valid(count, self.capacity)
        return {**{n: take(x, index, valid) for n, x in pool.items()}, "count": count}

    def _usage(self, attention: LayerAttention, weights: Tensor) -> Tensor:
        """Sum the attention that memory rows and the segment's own rows received, `(B, slots)`."""
        valid = attention.query_valid[:, None, :, None]
        received = (weights.detach().float() * valid).sum((1, 2))[:, self.config.compressed_size :]
        memory, segment_rows = received[:, : self.capacity], received[:, self.capacity :]
        positions, size = attention.key_positions, self.config.segment_size
        inside = (positions < size) & attention.key_valid
        segment = memory.new_zeros(len(memory), size)
        segment = segment.scatter_add(1, positions.clamp(0, size - 1), segment_rows * inside)
        return torch.cat([memory, segment], 1)

    def _usage_of_pool(self, usage: Tensor, positions: Tensor) -> Tensor:
        """Sort the attention that the columns of `[memory; segment]` received, `(B, slots)` with
        the segment's by position, into `(B, capacity + K)`."""
        memory, segment = usage[:, : self.capacity], usage[:, self.capacity :]
        received = segment.gather(1, positions.clamp(0, segment.shape[1] - 1))
        return torch.cat([memory, received * (positions < segment.shape[1])], 1)

    def _teach(
        self, layer: int, attention: LayerAttention, old: Tree, fresh: Tree, evicted: Tensor
    ) -> None:
        """Add the compressor's own loss for rows in which something was compressed."""
        config, rate = self.config, self.config.compression_rate
        count = old["place"].shape[1]
        valid = torch.arange(count, device=evicted.device) < evicted[:, None]
        wide = torch.promote_types(attention.value.dtype, torch.float32)
        constant = {n: x.detach().to(wide) for n, x in old.items()}
        compressors: Any = self.compressors[str(layer)]
        again = {
            n: ops.compress(
                constant[n], rate, config.compression, c.weight.to(wide), c.bias.to(wide)
            )
            for n, c in compressors.items()
        }
        if config.loss == "autoencoding":
            losses = [
                ops.autoencoding(
                    constant[n],
                    ops.decompress(again[n], c.decoder_weight.to(wide), c.decoder_bias.to(wide)),
                    valid,
                )
                for n, c in compressors.items()
            ]
            loss = torch.stack(losses).mean(0)
        else:
            pairs = []
            for rows in (constant, again):
                if config.store == "kv":
                    pairs.append((rows["key"], rows["value"]))
                else:
                    hidden = rows["hidden"].squeeze(1).to(attention.value.dtype)
                    keys, values = attention.project(hidden, frozen=True)
                    pairs.append((keys.to(wide), values.to(wide)))
            made = valid[:, rate - 1 :: rate]
            loss = ops.reconstruction(
                attention.query.to(wide), (*pairs[0], valid), (*pairs[1], made),
                scaling=attention.scaling, query_valid=attention.query_valid,
            )  # fmt: skip
        attention.losses.append(loss * (evicted > 0) * config.loss_weight / len(self.chosen))
