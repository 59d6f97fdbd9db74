"""LoLCATs: learned feature maps for what is older than a short window (Zhang et al. 2024).

Stage 1 teaches the maps to give what the softmax gives (attention transfer), stage 2 adapts the
converted model with LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwrap.backbones import LayerAttention
from memwrap.memories.parts.sliding_window import SlidingWindow
from memwrap.memories.parts.sums import SummedConfig
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, NonNegativeFloat, PositiveInt, Range
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import gla
from memwrap.ops.gla.features import learned_features
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


class LoLCATsConfig(SummedConfig):
    """Softmax over a short window and linear attention with learned features over all older
    tokens, under one normaliser.

    Examples:
        >>> import memwrap
        >>> memwrap.LoLCATsConfig(window_size=128).stage
        'finetune'

    Attributes:
        window_size: tokens that the softmax sees, the query itself among them.
        feature_size: columns of a feature map's matrix (`None`: half the head's width). There are
            twice as many features.
        key_maps: a map of the keys for every `"query_head"`, as published, or for every
            `"kv_head"`: heads that share keys then share a state.
        window_weight: weight of the window's terms before training; learned, one a query head.
        affine: weigh the linear terms with one minus the window's weight instead of 1.
        stage: `"transfer"` trains the maps and weights on each layer's attention output, every
            layer given what the softmax would have given it; segments are read one by one.
            `"finetune"` trains the converted model on text.
        loss_weight: of the transfer's mean squared error.
        layers: decoder layers that are converted (`None`: all).
        other_window_size: in the layers that are not: tokens that their own softmax sees.
    """

    name: ClassVar[str] = "lolcats"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"window_weight", "stage", "loss_weight"})

    window_size: PositiveInt = 64
    feature_size: PositiveInt | None = None
    key_maps: Literal["query_head", "kv_head"] = "query_head"
    window_weight: Annotated[float, Range(1e-6, 1 - 1e-6)] = 0.1
    affine: bool = False
    stage: Literal["transfer", "finetune"] = "finetune"
    loss_weight: NonNegativeFloat = 1000.0
    layers: LayerList | None = None
    other_window_size: PositiveInt = 1024

    @classmethod
    def tiny(cls) -> LoLCATsConfig:
        return cls(segment_size=8, window_size=4)


class LayerMaps(nn.Module):
    """One layer's feature maps and the logit of its window's weight."""

    def __init__(self, config: LoLCATsConfig, heads: int, keys: int, width: int, sizes: Sizes):
        super().__init__()
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        size = config.feature_size or max(1, width // 2)
        bound = width**-0.5
        self.query = nn.Parameter(torch.empty(heads, width, size, **make).uniform_(-bound, bound))
        self.key = nn.Parameter(torch.empty(keys, width, size, **make).uniform_(-bound, bound))
        logit = math.log(config.window_weight / (1 - config.window_weight))
        self.window = nn.Parameter(torch.full((heads,), logit, **make))


@register(LoLCATsConfig)
class LoLCATsMemory(AttentionMemory):
    """Per layer the sums over tokens that have left the window, in float32, and the window.

    A query at t reads `w exp(s - max) v` of the window and `phi(q) phi(k) v` of all tokens up to
    `t - window_size`, divided by the sum of both weights. A token enters the sums when it leaves
    the window; keys and queries are rotated to their true places before the maps.
    """

    claims = Claims(linearizes=True)
    sums = ("S",)
    counts_positions = True

    config: LoLCATsConfig
    branches = ("window", "recurrent")

    def __init__(self, config: LoLCATsConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.window = SlidingWindow(config.window_size, kept=config.window_size)
        self.other = SlidingWindow(config.other_window_size)
        self.maps = nn.ModuleDict()
        for layer in attending_layers(config, sizes):
            dims = sizes.attention[layer]
            keys = dims.num_heads if config.key_maps == "query_head" else dims.num_kv_heads
            self.maps[str(layer)] = LayerMaps(config, dims.num_heads, keys, dims.key_dim, sizes)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return {
            "layers": {
                str(layer): self._empty(layer, batch_size, device) for layer in self.sizes.attention
            }
        }

    def _empty(self, layer: int, batch_size: int, device: torch.device) -> Tree:
        dims, dtype = self.sizes.attention[layer], self.sizes.backbone_dtype
        if str(layer) not in self.maps:
            return {"window": self.other.empty(batch_size, dims, dtype, device)}
        maps: Any = self.maps[str(layer)]
        shape = (batch_size, maps.key.shape[0], 2 * maps.key.shape[2], dims.value_dim + 1)
        wide = torch.promote_types(dtype, torch.float32)
        return {
            "window": self.window.empty(batch_size, dims, dtype, device),
            "S": torch.zeros(shape, dtype=wide, device=device),
        }

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield from self.window.ranges(tree["window"], progress)

    @property
    def _transfers(self) -> bool:
        return self.training and self.config.stage == "transfer"

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        if str(layer) not in self.maps:
            return self.other.attend(attention, state["window"])[0], state
        out, state = self._hybrid(layer, attention, state)
        if not self._transfers:
            return out, state
        wanted = attention.local()
        valid = attention.query_valid.to(out)
        error = (out - wanted.detach().to(out.dtype)).square().mean((2, 3))
        mean = (error * valid).sum(1) / valid.sum(1).clamp_min(1)
        attention.losses.append(mean * (self.config.loss_weight / len(self.maps)))
        return wanted, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        if self._transfers:  # the teacher sees one segment
            return self._empty(layer, len(attention.value), attention.value.device)
        window = self.window if str(layer) in self.maps else self.other
        return {**state, "window": window.closed(attention, state["window"])}

    def _hybrid(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        """Join window and linear part under one normaliser, `(B, T, H, Dv)`; also gives the state
        after."""
        maps: Any = self.maps[str(layer)]
        local, weights = self.window.attend(attention, state["window"], weights=True)
        with torch.autocast(local.device.type, enabled=False):
            wide = state["S"].dtype
            share = torch.sigmoid(maps.window.to(wide))[:, None]
            rest = 1 - share if self.config.affine else torch.ones_like(share)
            # The softmax's own sum of exp(s - max) is one over its largest weight.
            largest = weights.to(wide).amax(-1)  # type: ignore[union-attr]
            window = (share / largest).transpose(1, 2)[..., None]
            linear, state = self._linear(maps, attention, state)
            linear = (linear * rest[..., None]).transpose(1, 2)
            beside = window * local.to(wide)
            linear = self.config.capped(linear, beside)
            if self.branch == "window":
                return local, state
            if self.branch == "recurrent":
                return linear[..., :-1] / linear[..., -1:].clamp_min(1e-12), state
            out = (beside + linear[..., :-1]) / (window + linear[..., -1:])
        return out, state

    def _linear(self, maps: Any, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        """Sum over the tokens behind the window, `(B, H, T, Dv + 1)`; also gives the state after
        the step."""
        wide = state["S"].dtype
        evicted = self.window.evicted(attention, state["window"])
        keys, values = self.window.evicted_key_values(attention, state["window"])
        keys = attention.rotate(keys, evicted.positions.clamp_min(0), "evicted")
        query = attention.rotate(attention.query, evicted.query_positions, "in the document")
        q = learned_features(query, maps.query.to(wide))
        group = attention.groups
        values = F.pad(values, (0, 1), value=1.0).to(wide)
        if self.config.key_maps == "query_head":
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        k = learned_features(keys, maps.key.to(wide))
        entering = attention.query_valid & (evicted.positions >= 0)
        out, S = gla.scan(q, k, values, None, state["S"], scale=1.0, mask=entering)
        return out, {**state, "S": S}

    def figures(self) -> dict[str, Tensor]:
        layers: list[Any] = list(self.maps.values())
        return {"window_weight": torch.stack([m.window.detach().float().sigmoid() for m in layers])}
