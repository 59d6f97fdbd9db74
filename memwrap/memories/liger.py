"""Liger: attention becomes a gated recurrence beside a short window (Lan et al. 2025).

The gates are made of the keys that the layer projects anyway, so that a conversion adds no
parameter: the pretrained weights are linearized as they are and then adapted with LoRA. What has
parameters of its own, the gates of GDN-2 and routed memories beside the one that takes in all (Du
et al. 2025, "MoM"), starts as if it were not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwrap.backbones import AttentionSizes, LayerAttention
from memwrap.memories.parts.sliding_window import SlidingWindow
from memwrap.memories.parts.sums import SummedConfig
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import (
    LayerList,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
)
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import delta, gla
from memwrap.ops.gla import gsa
from memwrap.ops.gla.features import FEATURE_MAPS, SAME_WIDTH, FeatureMap, feature_width, features
from memwrap.ops.mixture import Routing
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree

EPS = 1e-10
ROUTER_STD = 0.02  # not zero: all memories would tie
Form = Literal["gla", "hgrn2", "gsa", "linear", "retnet", "delta", "gated_delta", "kda", "gdn2"]
DELTA_RULES = ("delta", "gated_delta", "kda", "gdn2")
BRANCHES = ("window", "recurrent")
# By form: the feature map, the gate's divisor.
_DEFAULTS = {
    "gla": ("softmax", 16.0), "hgrn2": ("softmax", 1.0), "gsa": ("none", 16.0),
    "linear": ("softmax", 1.0), "retnet": ("softmax", 1.0), "delta": ("none", 1.0),
    "gated_delta": ("none", 16.0), "kda": ("none", 16.0), "gdn2": ("none", 16.0),
}  # fmt: skip


class LigerConfig(SummedConfig):
    """Attention as a recurrence with gates made of the keys, mixed with a sliding window.

    Examples:
        >>> import memwrap
        >>> memwrap.LigerConfig(form="delta").window_size
        64

    Attributes:
        form: `"gla"` (a gate a channel), `"hgrn2"` (the key is one minus the gate), `"gsa"`
            (slots), `"linear"` (no gate), `"retnet"` (a fixed decay a head), `"delta"`,
            `"gated_delta"` (a gate a head), `"kda"` (a gate a channel) or `"gdn2"` (that, and
            learned strengths of erasing and writing by channel).
        window_size: tokens that the softmax sees, the query itself among them; 0 for none. The
            published code's 64 sees 65.
        num_sinks: first tokens that the softmax sees too. Published: none.
        window_weight, recurrent_weight: of the two branches.
        feature_map: of queries and keys, one of `"softmax"`, `"elu"`, `"hedgehog"`, `"taylor"`,
            `"none"`; by default `"softmax"`, and `"none"` for slots and the delta rules.
        rotate: rotate queries and keys to their places before the feature map.
        normaliser: divide what is read by the sum of the features' products; by default for
            `"linear"` only.
        gate_divisor: the log of the gate is divided by it; by default 16, and 1 for `"hgrn2"`.
        num_slots: slots a head of `"gsa"`, a divisor of the head's width (`None`: the width).
        layers: decoder layers that are converted (`None`: all).
        other_window_size: in the layers that are not: tokens that their own softmax sees, with
            the sinks. A text up to this length has full attention there.
        num_memories: recurrences that a learned router chooses from for each token; 0: none.
        top_k: so many of them take a token in, and are read by it.
        shared: beside them one recurrence takes in all tokens, as without them; what is read from
            the others is added with a learned weight a head that starts at 0.
        balance_weight: of the loss that keeps the router from using few of them.
    """

    name: ClassVar[str] = "liger"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"balance_weight"})

    form: Form = "gla"
    window_size: NonNegativeInt = 64
    num_sinks: NonNegativeInt = 4
    window_weight: NonNegativeFloat = 0.5
    recurrent_weight: NonNegativeFloat = 0.5
    feature_map: FeatureMap | None = None
    rotate: bool = False
    normaliser: bool | None = None
    gate_divisor: Annotated[float, Range(1e-3)] | None = None
    num_slots: PositiveInt | None = None
    layers: LayerList | None = None
    other_window_size: PositiveInt = 1024
    num_memories: NonNegativeInt = 0
    top_k: PositiveInt = 2
    shared: bool = True
    balance_weight: NonNegativeFloat = 0.01

    def __post_init__(self) -> None:
        if self.window_size == 0 and self.num_sinks and self.layers is None:
            self.num_sinks = 0  # no softmax is left that could see them

    def validate_feature_map(self) -> None:
        allowed: tuple[str, ...] = FEATURE_MAPS
        if self.form in ("hgrn2", "gsa"):
            allowed = SAME_WIDTH
        elif self.form in ("gla", "kda", "gdn2"):
            # A gate a channel says nothing of products of channels.
            allowed = tuple(n for n in FEATURE_MAPS if n != "taylor")
        if self.feature_map is not None and self.feature_map not in allowed:
            self.refuse("feature_map", f"for {self.form!r} one of {', '.join(allowed)}")

    def validate_normaliser(self) -> None:
        if self.normaliser and self.form in ("gsa", *DELTA_RULES):
            self.refuse("normaliser", f"false for {self.form!r}, whose reads need none")

    def validate_read_cap(self) -> None:
        if self.read_cap is not None and not self.window_size:
            self.refuse("read_cap", "None without a window, beside which a read would be capped")

    def validate_top_k(self) -> None:
        if 0 < self.num_memories < self.top_k:
            self.refuse("top_k", f"at most num_memories ({self.num_memories})")

    def validate_shared(self) -> None:
        if not (self.shared or self.num_memories):
            self.refuse("shared", "true without num_memories: nothing else would be left")

    @property
    def features(self) -> str:
        """The feature map in use."""
        return self.feature_map or _DEFAULTS[self.form][0]

    @property
    def divisor(self) -> float:
        """The gate's divisor in use."""
        return _DEFAULTS[self.form][1] if self.gate_divisor is None else self.gate_divisor

    @property
    def normalised(self) -> bool:
        """Whether reads are divided by the features' products."""
        return self.form == "linear" if self.normaliser is None else self.normaliser

    @classmethod
    def tiny(cls) -> LigerConfig:
        return cls(segment_size=8, window_size=5, num_sinks=2)


class LayerLiger(nn.Module):
    """One layer's own parameters: a router and the weight of what routed memories give, maps of the
    strengths of GDN-2, which start as KDA's.

    M memories, H heads, D the hidden size, Dk and Dv the widths of all KV heads together.
    """

    def __init__(self, config: LigerConfig, dims: AttentionSizes, sizes: Sizes) -> None:
        super().__init__()
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        width, keys = sizes.hidden_size, feature_width(config.features, dims.key_dim)
        if config.num_memories:
            router = torch.empty(config.num_memories, width, **make).normal_(std=ROUTER_STD)
            self.router = nn.Parameter(router)
            start = 0.0 if config.shared else 1.0
            self.routed_weight = nn.Parameter(torch.full((dims.num_heads,), start, **make))
        if config.form == "gdn2":
            self.erase = nn.Parameter(torch.zeros(dims.num_kv_heads * keys, width, **make))
            writing = dims.num_kv_heads * dims.value_dim
            self.write = nn.Parameter(torch.zeros(writing, width, **make))

    def strengths(self, inputs: Tensor, logit: Tensor) -> list[Tensor]:
        """Compute GDN-2's strengths of the write `(B, Hkv, T, Dv)` and of erasing `(B, Hkv, T,
        Dk)`, from the attention's input `(B, T, D)` and KDA's logit of both `(B, Hkv, T)`."""
        inputs = inputs.to(logit.dtype)
        maps = (inputs @ x.to(logit.dtype).T for x in (self.write, self.erase))
        heads = (x.unflatten(2, (logit.shape[1], -1)).transpose(1, 2) for x in maps)
        return [(x + logit[..., None]).sigmoid() for x in heads]

    def mixed(self, routing: Routing, read: Tensor) -> Tensor:
        """Join what was read from all states `(B, N, H, T, Dv)`: `(B, H, T, Dv)`."""
        weight, count = self.routed_weight, routing.weights.shape[-1]
        wide = routing.weights.dtype
        routed = routing.mixed(read[:, :count].to(wide)) * weight.to(wide)[:, None, None]
        return (routed + read[:, count:].sum(1)).to(read.dtype)


@register(LigerConfig)
class LigerMemory(AttentionMemory):
    """Per layer and KV head the recurrence's matrix, in float32, and the window's keys and values.

    The matrix takes in every token as it is read, so that nothing depends on where segments end;
    the window reaches back over their ends. All heads that share keys and values share the matrix.
    With a router there are several, `(B, N, Hkv, Dk, Dv)`, the shared one last.
    """

    claims = Claims(linearizes=True)
    sums = ("S", "K", "V")

    config: LigerConfig
    branches = BRANCHES
    draws_branches = True

    def __init__(self, config: LigerConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.chosen = frozenset(attending_layers(config, sizes))
        self.window = SlidingWindow(config.window_size, config.num_sinks)
        self.other = SlidingWindow(config.other_window_size, config.num_sinks)
        windows = (self._window(layer) for layer in sizes.attention)
        self.reaches = max((window.reaches for window in windows if window), default=0)
        self.networks = nn.ModuleDict()
        for layer in sorted(self.chosen):
            self._check(layer, sizes.attention[layer].key_dim)
            if config.num_memories or config.form == "gdn2":
                self.networks[str(layer)] = LayerLiger(config, sizes.attention[layer], sizes)

    def _check(self, layer: int, width: int) -> None:
        slots = self.config.num_slots
        if self.config.form == "gsa" and slots and width % slots:
            raise ValueError(
                f"LigerConfig.num_slots is {slots}; it must divide the heads' width, {width} in "
                f"layer {layer}."
            )

    @property
    def counts_positions(self) -> bool:  # type: ignore[override]
        """Whether the recurrence rotates by where a token stands in the text."""
        return bool(self.config.rotate)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        layers: Tree = {}
        for layer, dims in self.sizes.attention.items():
            tree: Tree = {}
            window = self._window(layer)
            if window is not None:
                dtype = self.sizes.backbone_dtype
                tree["window"] = window.empty(batch_size, dims, dtype, device)
            if layer in self.chosen:
                tree |= self._empty(batch_size, dims, device)
                tree["read"] = torch.zeros(batch_size, dtype=torch.long, device=device)
            layers[str(layer)] = tree
        return {"layers": layers}

    def _empty(self, batch_size: int, dims: AttentionSizes, device: torch.device) -> Tree:
        dtype = torch.promote_types(self.sizes.backbone_dtype, torch.float32)
        rows = [batch_size]
        if self.config.num_memories:
            rows.append(self.config.num_memories + self.config.shared)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*rows, dims.num_kv_heads, *shape, dtype=dtype, device=device)

        if self.config.form == "gsa":
            slots = self.config.num_slots or dims.key_dim
            return {"K": zeros(dims.key_dim, slots), "V": zeros(slots, dims.value_dim)}
        keys = feature_width(self.config.features, dims.key_dim)
        return {"S": zeros(keys, dims.value_dim + self.config.normalised)}

    def _window(self, layer: int) -> SlidingWindow | None:
        if layer not in self.chosen:
            return self.other
        return self.window if self.window.size else None

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            if "window" in tree:
                yield from self.window.ranges(tree["window"], progress)
            if "read" in tree:
                yield tree["read"], *progress.read

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        window = self._window(layer)
        if layer not in self.chosen:
            return self.other.attend(attention, state["window"])[0], state
        with torch.autocast(attention.value.device.type, enabled=False):
            read, state = self._recurrent(layer, attention, state)
        if window is None:
            return read * (self.config.window_weight + self.config.recurrent_weight), state
        of_window, of_recurrence = self._weights(read)
        local = window.attend(attention, state["window"])[0].to(read.dtype)
        read = self.config.capped(read, local)
        if not isinstance(of_recurrence, Tensor) and of_window + of_recurrence == 1:
            # One pass over the tokens instead of three.
            return torch.lerp(local, read, of_recurrence), state
        return of_window * local + of_recurrence * read, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        window = self._window(layer)
        if window is None:
            return state
        return {**state, "window": window.closed(attention, state["window"])}

    def _weights(self, read: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Weigh the window and the recurrence: numbers, or `(B, 1, 1, 1)`."""
        weights = self.config.window_weight, self.config.recurrent_weight
        branch, share = self.drawn_branch
        if branch == "both" or not share:
            return weights
        alone = (sum(weights), 0.0) if branch == "window" else (0.0, sum(weights))
        if share == 1:
            return alone
        if not self.training:
            return weights
        drawn = torch.rand(len(read), 1, 1, 1, device=read.device) < share
        window, recurrence = (
            torch.where(drawn, one, both).to(read.dtype)
            for one, both in zip(alone, weights, strict=True)
        )
        return window, recurrence

    def _recurrent(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        """Read the recurrence for the step's tokens, `(B, T, H, Dv)`; also gives the state
        after."""
        names, valid = [n for n in ("S", "K", "V") if n in state], attention.query_valid
        states = [state[n] for n in names]
        new: Tree = {**state, "read": state["read"] + valid.sum(1)}
        if not self.config.num_memories:
            mask = valid if attention.padded else None
            out, ends = self._scan(layer, attention, state["read"], states, mask)
            return out.transpose(1, 2), new | dict(zip(names, ends, strict=True))
        network: Any = self.networks[str(layer)]
        wide = states[0].dtype
        routing = Routing.of(
            attention.inputs.to(wide) @ network.router.to(wide).T, self.config.top_k
        )
        if self.training and self.config.balance_weight:
            loss = routing.imbalance(valid) * (self.config.balance_weight / len(self.networks))
            attention.losses.append(loss)
        mask = routing.mask(valid, self.config.shared)
        joined = [x.flatten(0, 1) for x in states]
        out, ends = self._scan(layer, attention, state["read"], joined, mask)
        rows = (len(valid), -1)
        out = network.mixed(routing, out.unflatten(0, rows))
        ends = [x.unflatten(0, rows) for x in ends]
        return out.transpose(1, 2), new | dict(zip(names, ends, strict=True))

    def _scan(
        self, layer: int, attention: LayerAttention, read: Tensor, states: list[Tensor],
        mask: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Read N states of each row, `(B * N, Hkv, ...)`: `(B * N, H, T, Dv)`; each takes in the
        tokens of its `mask` `(B * N, T)`. Also gives the states after."""
        config = self.config
        q, length = attention.query, attention.query.shape[2]
        k, v = attention.step_key, attention.value[:, :, attention.value.shape[2] - length :]
        dtype, raw = v.dtype, k.to(states[0].dtype)  # before feature map and rotation
        if config.rotate:
            positions = read[:, None] + attention.query_valid.cumsum(1) - 1
            q, k = (attention.rotate(x, positions) for x in (q, k))
        count = len(states[0]) // len(q)

        def rows(*tensors: Tensor | None) -> list[Any]:
            if count == 1:
                return [*tensors]
            return [None if x is None else x.repeat_interleave(count, 0) for x in tensors]

        full: dict[str, Any] = {"mask": mask, "scale": 1.0}
        if config.form == "gsa":
            slots = states[0].shape[-1]
            log = F.logsigmoid(raw.unflatten(-1, (slots, -1)).mean(-1)) / config.divisor
            q, k = (features(x, config.features).to(dtype) for x in (q, k))
            q, k, v, s, log = rows(q, k, v, -torch.expm1(log), log)
            out, ends = gsa.scan(q, k, v, s, log, (states[0], states[1]), **full)
            return out, [*ends]
        forget = self._gate(raw)
        k = features(k, config.features) if config.form != "hgrn2" else raw.neg().sigmoid()
        q, k = features(q, config.features).to(dtype), k.to(dtype)
        if config.normalised:
            v = F.pad(v, (0, 1), value=1.0)
        if config.form in DELTA_RULES:
            logit, erase = raw.mean(-1), None
            beta = logit.sigmoid()
            if config.form == "gdn2":
                network: Any = self.networks[str(layer)]
                beta, erase = network.strengths(attention.inputs, logit)
            q, k, v, beta, forget, erase = rows(q, k, v, beta, forget, erase)
            full |= {"erase": erase, "l2norm": True}
            out, end = delta.scan(q, k, v, beta, forget, states[0], **full)
        else:
            q, k, v, forget = rows(q, k, v, forget)
            out, end = gla.scan(q, k, v, forget, states[0], **full)
        if config.normalised:
            out = out[..., :-1] / out[..., -1:].clamp_min(EPS)
        return out, [end]

    def figures(self) -> dict[str, Tensor]:
        if not self.config.num_memories:
            return {}
        networks: list[Any] = list(self.networks.values())
        return {"routed_weight": torch.stack([n.routed_weight.detach().float() for n in networks])}

    def _gate(self, raw: Tensor) -> Tensor | None:
        """Compute the log of the forget gate, from raw keys `(B, Hkv, T, Dk)`."""
        form, divisor = self.config.form, self.config.divisor
        if form in ("linear", "delta"):
            return None
        if form == "retnet":
            heads = torch.arange(raw.shape[1], device=raw.device, dtype=raw.dtype)
            decay = torch.log1p(-torch.exp2(-5 - heads))
            return decay[:, None].expand(raw.shape[0], -1, raw.shape[2])
        if form == "gated_delta":
            return F.logsigmoid(raw.mean(-1)) / divisor
        log = F.logsigmoid(raw) / divisor
        return torch.cat([log, log], -1) if self.config.features == "hedgehog" else log
