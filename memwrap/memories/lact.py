"""LaCT: a small network in every attention, whose weights are the state (Zhang et al. 2025).

"Test-Time Training Done Right". A whole segment's keys and values make one step on the network;
later segments read it with their queries, beside a window. Titans' memory (Behrouz et al. 2025) is
a setting: other networks, and a step with momentum and decay for every token.
"""

from __future__ import annotations

import math
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
from memwrap.memories.settings import LayerList, NonNegativeInt, PositiveInt, Range
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import fast_weights
from memwrap.ops.fast_weights import FastMemory, StepRule, Weights, WriteGates
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree

EPS = 1e-5  # of unit keys, and of the norm of what is read
DECAY = -6.0  # the logit of Titans' decay before training: a token leaves 0.9975 of the weights


class LaCTConfig(SummedConfig):
    """Softmax over a window with sinks, and beside it a small network per KV head that a whole
    segment's keys and values change by one step.

    Examples:
        >>> import memwrap
        >>> memwrap.LaCTConfig(layers=[4, 8]).step
        'muon'

    Attributes:
        window_size: tokens that the softmax sees, the query itself among them; `None`:
            `segment_size`, as published. Fewer would leave tokens of the open segment to nobody.
        num_sinks: first tokens that the softmax sees too. Published: none.
        network: `"swiglu"` (LaCT), `"linear"` or `"mlp"` (Titans: two layers around which the input
            is added).
        inner_width: width inside the network (`None`: a key's).
        step: `"muon"` (the step's singular values are brought near 1) or `"gradient"`, both with
            one step a segment and rows that keep their norms; `"titans"`: a step a token on the
            squared error, with momentum and decay and without norms, where all gradients are at
            the weights that the segment found.
        momentum: a part of the last step is made again; how much is read from the tokens.
        row_norm: `"post"` scales the rows of what the next step starts from, `"pre"` only of what
            is read (not with `"titans"`).
        base_rate: learning rate of a token before training. With `"muon"` only the tokens' shares
            in the step depend on rates.
        first_segment: `"local_only"` reads nothing before the first write, so that one segment
            gives what the base gives; `"read"` reads the learned network there too, as published.
        layers: decoder layers with a network; the others have window and sinks alone (`None`: all).
    """

    name: ClassVar[str] = "lact"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"base_rate"})

    window_size: PositiveInt | None = None
    num_sinks: NonNegativeInt = 4
    network: Literal["swiglu", "linear", "mlp"] = "swiglu"
    inner_width: PositiveInt | None = None
    step: Literal["muon", "gradient", "titans"] = "muon"
    momentum: bool = True
    row_norm: Literal["post", "pre"] = "post"
    base_rate: Annotated[float, Range(above=0)] = 1e-2
    first_segment: Literal["local_only", "read"] = "local_only"
    layers: LayerList | None = None

    def validate_window_size(self) -> None:
        if self.window_size is not None and self.window_size < self.segment_size:
            self.refuse("window_size", f"None or at least `segment_size` ({self.segment_size})")

    @property
    def window(self) -> int:
        """Tokens that the softmax sees."""
        return self.window_size or self.segment_size

    @classmethod
    def tiny(cls) -> LaCTConfig:
        # Muon carries the rounding of a step's small directions up, to 1e-5 of a state.
        return cls(segment_size=8, window_size=16, num_sinks=2, step="gradient")


class LayerLaCT(nn.Module):
    """One layer's network before the first segment, what its tokens are written with, and an output
    scale whose map starts at zero: nothing is added before training.

    G KV heads, H query heads, D the hidden size, n matrices.
    """

    def __init__(self, config: LaCTConfig, dims: AttentionSizes, sizes: Sizes) -> None:
        super().__init__()
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        count, width, key = dims.num_kv_heads, sizes.hidden_size, dims.key_dim
        self.rule = StepRule(network=config.network, step=config.step, row_norm=config.row_norm)
        inner = config.inner_width or key
        matrices = fast_weights.shapes(config.network, key, dims.value_dim, inner)
        self.first = nn.ParameterList(
            torch.randn(count, out, into, **make) * into**-0.5 for out, into in matrices
        )
        self.key_scale = nn.Parameter(torch.ones(count, key, **make))
        self.key_offset = nn.Parameter(torch.zeros(count, key, **make))
        self.query_scale = nn.Parameter(torch.ones(dims.num_heads, key, **make))
        self.query_offset = nn.Parameter(torch.zeros(dims.num_heads, key, **make))
        rates = 1 if config.step == "titans" else len(matrices)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, width, **make).uniform_(-1, 1) * width**-0.5)

        def constant(number: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, number, **make))

        self.rate = drawn(count, rates)
        # The inverse of softplus, for small rates and for large ones.
        base = config.base_rate
        self.rate_bias = constant(base + math.log(-math.expm1(-base)), count, rates)
        self.keep: nn.Parameter | None = None
        self.keep_bias: nn.Parameter | None = None
        if config.momentum:
            self.keep, self.keep_bias = drawn(count), constant(0.0, count)
        self.decay: nn.Parameter | None = None
        self.decay_bias: nn.Parameter | None = None
        if config.step == "titans":
            self.decay, self.decay_bias = drawn(count), constant(DECAY, count)
        self.norm = nn.Parameter(torch.ones(dims.value_dim, **make))
        self.read = nn.Parameter(torch.zeros(dims.num_heads, width, **make))

    def weights(self) -> Weights:
        """Return the network before the first segment, in float32 (float64 for float64
        parameters)."""
        wide = torch.promote_types(self.norm.dtype, torch.float32)
        return tuple(w.to(wide) for w in self.first)

    def gates(self, hidden: Tensor) -> WriteGates:
        """Compute what tokens `(B, K, D)` are written with."""
        rates = torch.einsum("bkd,gnd->bgkn", hidden, self.rate.to(hidden))
        rates = F.softplus(rates + self.rate_bias.to(hidden)[:, None])
        return WriteGates(
            rates,
            _gate(hidden, self.keep, self.keep_bias),
            _gate(hidden, self.decay, self.decay_bias),
        )

    def written(self, attention: LayerAttention, memory: FastMemory) -> FastMemory:
        """Write the segment that closes."""
        wide = memory.weights[0].dtype
        key = _unit(attention.key.to(wide), self.key_scale, self.key_offset)
        hidden: Tensor = attention.hidden.to(wide)  # type: ignore[union-attr]
        mask = None if bool(attention.key_valid.all()) else attention.key_valid
        return fast_weights.write(
            self.rule, memory, key, F.silu(attention.value.to(wide)), self.gates(hidden),
            self.weights(), mask,
        )  # fmt: skip

    def output(self, attention: LayerAttention, weights: Weights) -> Tensor:
        """Compute what is added to the attention's heads, `(B, T, H, Dv)`."""
        wide = weights[0].dtype
        query = _unit(attention.query.to(wide), self.query_scale, self.query_offset)
        result = fast_weights.read(self.rule.network, weights, query)
        result = F.rms_norm(result, result.shape[-1:], self.norm.to(wide), EPS)
        scale = F.silu(attention.inputs.to(wide) @ self.read.to(wide).T)
        return result.transpose(1, 2) * scale[..., None]


def _unit(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Make unit vectors of heads `(B, H, T, D)`, as all keys and queries of a network are."""
    x = F.silu(x * scale.to(x)[:, None] + offset.to(x)[:, None])
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + EPS)


def _gate(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Compute a gate `(B, G, K)` from 0 to 1; None where it has no weights."""
    if weight is None or bias is None:
        return None
    return (hidden @ weight.to(hidden).T + bias.to(hidden)).sigmoid().transpose(1, 2)


@register(LaCTConfig)
class LaCTMemory(AttentionMemory):
    """Per layer the window's keys and values and, in float32, the networks' matrices `w0`, `w1`,
    ...; with momentum the last steps `m0`, ..., and with `row_norm="pre"` the raw sums `t0`, ...

    A segment reads the network as it was before it, with un-rotated queries; it writes as it
    closes, with un-rotated keys. A row begins with a copy of the learned network.
    """

    claims = Claims(neutral_start=True)
    sums = ("w0", "w1", "w2", "t0", "t1", "t2")

    config: LaCTConfig
    branches = ("window", "recurrent")
    needs_hidden = True

    def __init__(self, config: LaCTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.window = SlidingWindow(config.window, config.num_sinks)
        self.reaches = self.window.reaches
        self.networks = nn.ModuleDict()
        for layer in attending_layers(config, sizes):
            self.networks[str(layer)] = LayerLaCT(config, sizes.attention[layer], sizes)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        layers: Tree = {}
        for layer, dims in self.sizes.attention.items():
            dtype = self.sizes.backbone_dtype
            layers[str(layer)] = {"window": self.window.empty(batch_size, dims, dtype, device)}
            if str(layer) in self.networks:
                network: Any = self.networks[str(layer)]
                first = tuple(
                    w.to(device).expand(batch_size, -1, -1, -1) for w in network.weights()
                )
                zero = tuple(torch.zeros_like(w) for w in first) if self.config.momentum else None
                total = first if network.rule.keeps_sum else None
                layers[str(layer)] |= _tree(FastMemory(first, zero, total))
                written = torch.zeros(batch_size, dtype=torch.bool, device=device)
                layers[str(layer)]["written"] = written
        return {"layers": layers}

    def sums_before(self, layer: int) -> Tree:
        network: Any = self.networks[str(layer)]
        weights = network.weights()
        return _tree(FastMemory(weights, None, weights))

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield from self.window.ranges(tree["window"], progress)

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        local = self.window.attend(attention, state["window"])[0]
        if str(layer) not in self.networks or self.branch == "window":
            return local, state
        network: Any = self.networks[str(layer)]
        with torch.autocast(local.device.type, enabled=False):
            recurrent = network.output(attention, _parts(state, "w"))
            recurrent = self.config.capped(recurrent, local)
            if self.config.first_segment == "local_only":
                recurrent = torch.where(state["written"].view(-1, 1, 1, 1), recurrent, 0.0)
            if self.branch == "recurrent":
                return recurrent, state
            return local.to(recurrent.dtype) + recurrent, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        new: Tree = {"window": self.window.closed(attention, state["window"])}
        if str(layer) in self.networks:
            network: Any = self.networks[str(layer)]
            memory = FastMemory(_parts(state, "w"), _parts(state, "m"), _parts(state, "t"))
            with torch.autocast(attention.value.device.type, enabled=False):
                new |= _tree(network.written(attention, memory))
            new["written"] = torch.ones_like(state["written"])
        return new

    def optimizer_groups(self) -> list[dict[str, Any]]:
        networks: list[Any] = list(self.networks.values())
        biases = [
            p for n in networks for p in (n.rate_bias, n.keep_bias, n.decay_bias) if p is not None
        ]
        return [{"params": biases, "weight_decay": 0.0}] if biases else []

    def figures(self) -> dict[str, Tensor]:
        networks: list[Any] = list(self.networks.values())
        return {"output_norm": torch.stack([n.read.detach().float().norm(dim=1) for n in networks])}


def _tree(memory: FastMemory) -> Tree:
    """Lay out a network's matrices as a layer's tree."""
    parts = {"w": memory.weights, "m": memory.momentum, "t": memory.total}
    return {f"{n}{i}": w for n, weights in parts.items() for i, w in enumerate(weights or ())}


def _parts(state: Tree, name: str) -> Any:
    """Take a tuple of matrices from a layer's tree; None where it has none of that name."""
    count = sum(f"{name}{i}" in state for i in range(3))
    return tuple(state[f"{name}{i}"] for i in range(count)) or None
