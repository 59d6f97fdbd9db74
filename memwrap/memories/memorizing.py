"""Memorizing attention: queries look up keys and values of the past (Wu et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.backbones import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.joint_softmax import merge_attention_states
from memwrap.memories.parts.key_value_ring import KeyValueRings
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import GateLogit, LayerList, NonNegativeFloat, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers, three_quarters
from memwrap.ops import retrieve
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree

SCALE = 20.0  # of cosines, where a learned scale starts


class MemorizingConfig(MemoryConfig):
    """Memorizing attention: keys and values of closed segments are kept as they are, and every
    query attends to its `top_k` best ones beside its own segment.

    Examples:
        >>> import memwrap
        >>> memwrap.MemorizingConfig(cache_size=4096).top_k
        32

    Attributes:
        cache_size: entries that are kept for each KV head; when they are full the oldest goes.
        top_k: entries that a query attends to.
        combine: `"gate"`, two softmaxes mixed by a gate for each query head (section 3.2), or
            `"joint"`, one softmax over the retrieved entries and the segment.
        gate_init: b before training; the gate is sigmoid(b). -3 leaves a wrapped model near its
            base; the paper's 0 halves its local attention.
        gate_learning_rate: learning rate of gates and scales, in an optimizer group without weight
            decay.
        qk_norm: entries are looked up and scored by cosine, with a learned scale for each query
            head. It bounds how far old entries fall behind weights in training (section 3.2).
        bptt_segments: gradients reach retrieved entries of so many segments; 1 as published.
        layers: decoder layers that have a memory (`None`: one, at three quarters of the depth).
    """

    name: ClassVar[str] = "memorizing"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"top_k", "gate_init", "gate_learning_rate"})

    cache_size: PositiveInt = 8192
    top_k: PositiveInt = 32
    combine: Literal["gate", "joint"] = "gate"
    gate_init: GateLogit = -3.0
    gate_learning_rate: NonNegativeFloat = 1e-2
    qk_norm: bool = False
    layers: LayerList | None = None

    @classmethod
    def tiny(cls) -> MemorizingConfig:
        return cls(segment_size=8, cache_size=20, top_k=3, layers=[0, 1])


@register(MemorizingConfig)
class MemorizingMemory(AttentionMemory):
    """Per layer a ring of un-rotated keys and of values for each KV head. It grows with what is
    read until `cache_size` entries are there.

    A segment looks things up in the cache as it was before it, and is added when it closes. Keys
    and queries are un-rotated: what is retrieved has no place.
    """

    claims = Claims(neutral_start=True, bounded=False, lengthens=True)

    config: MemorizingConfig

    def __init__(self, config: MemorizingConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        one = config.layers is None
        self.chosen = [three_quarters(sizes)] if one else attending_layers(config, sizes)
        self.gates, self.scales = nn.ParameterDict(), nn.ParameterDict()
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        for layer in self.chosen:
            heads = sizes.attention[layer].num_heads
            if config.combine == "gate":
                gate = torch.full((heads,), float(config.gate_init), **make)
                self.gates[str(layer)] = nn.Parameter(gate)
            if config.qk_norm:
                self.scales[str(layer)] = nn.Parameter(torch.full((heads,), SCALE, **make).log())

    @property
    def rings(self) -> KeyValueRings:
        """The rings of the chosen layers, in the backbone's dtype."""
        dims = {layer: self.sizes.attention[layer] for layer in self.chosen}
        return KeyValueRings(self.config.cache_size, dims, self.sizes.backbone_dtype)

    @property
    def bytes_per_token(self) -> float:  # type: ignore[override]
        return self.rings.bytes_per_token

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return self.rings.empty(batch_size, device)

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        yield from self.rings.ranges(state)
        for tree in state["layers"].values():
            yield tree["count"], *progress.closed

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        joint = self.config.combine == "joint"
        query, scale, softcap = attention.query, attention.scaling, None
        with torch.autocast(query.device.type, enabled=False):
            if self.config.qk_norm:
                query, scale = retrieve.normalise(query), self.scales[str(layer)].exp()
            elif joint:
                softcap = attention.softcap
            read = retrieve.attend(
                query, state["key"], state["value"], self.rings.filled(state),
                self.config.top_k, scale=scale, softcap=softcap,
            )  # fmt: skip
        if joint:
            most = max(1, read.index.shape[-1])
            out = merge_attention_states(attention, read.out, read.logsumexp, most)[0]
            return out, state
        local = attention.local()
        gate = torch.sigmoid(self.gates[str(layer)].to(read.out.dtype))[:, None]
        gate = torch.where((state["count"] > 0).view(-1, 1, 1, 1), gate, 0.0)
        mixed = gate * read.out.transpose(1, 2) + (1 - gate) * local.to(read.out.dtype)
        return mixed, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        key = retrieve.normalise(attention.key) if self.config.qk_norm else attention.key
        return self.rings.add(state, key, attention.value, attention.key_valid)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        parameters = [*self.gates.parameters(), *self.scales.parameters()]
        if not parameters:
            return []
        return [{"params": parameters, "lr": self.config.gate_learning_rate, "weight_decay": 0.0}]

    def figures(self) -> dict[str, Tensor]:
        gates = [g.detach().float() for g in self.gates.values()]
        return {"gate": torch.sigmoid(torch.stack(gates))} if gates else {}
