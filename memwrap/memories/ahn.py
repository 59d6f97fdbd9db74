"""AHN: what leaves a sliding window is taken up by a small recurrence (Fang et al. 2025).

"Artificial Hippocampus Networks". The backbone stays as it is and reads its window as ever; the
recurrence is fed with the keys and values that leave it, and adds what a query finds there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memwrap.backbones import AttentionSizes, LayerAttention
from memwrap.memories.parts.sliding_window import Evicted, SlidingWindow
from memwrap.memories.parts.sums import SummedConfig
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, NonNegativeInt, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import delta, gla
from memwrap.ops.buffers import take
from memwrap.state.progress import Progress
from memwrap.state.trees import RECENT, Tree

EPS = 1e-5  # of the norm
RATES = (1e-3, 16.0)  # A, drawn between
_LEAST = -1e4  # a log decay that leaves nothing, in every dtype
STEPS = (1e-3, 1e-1)  # softplus of the bias of Delta, drawn between on a log scale


class AHNConfig(SummedConfig):
    """Softmax over a window with sinks, and beside it a recurrence over all that left the window.

    Examples:
        >>> import memwrap
        >>> memwrap.AHNConfig(window_size=512).window_size
        512

    Attributes:
        form: of the recurrence: `"gated_delta"` (AHN-GDN), `"delta"` (AHN-DN, eq. 10) or
            `"gated"` (AHN-Mamba2, eq. 9).
        window_size: tokens that the softmax sees, the query itself among them. Published: 32,640.
        num_sinks: first tokens that the softmax sees too, and that never enter the recurrence.
            Published: 128.
        train_windows: window sizes, one of which every row of a training batch draws as it begins
            a text, so that the recurrence learns from short texts what it needs for long ones
            (`None`: `window_size`).
        states: a state for every `"query_head"`, as published, or for every `"kv_head"`: heads
            that share keys then share a state.
        rotate: queries and keys are rotated to their places in the document, as published.
        layers: decoder layers with a recurrence; the others have window and sinks alone. `None`:
            all but those with a shorter window of their own, unless all are such.
    """

    name: ClassVar[str] = "ahn"

    form: Literal["gated_delta", "delta", "gated"] = "gated_delta"
    window_size: PositiveInt = 1024
    num_sinks: NonNegativeInt = 4
    train_windows: list[PositiveInt] | None = None
    states: Literal["query_head", "kv_head"] = "query_head"
    rotate: bool = True
    layers: LayerList | None = None

    def validate_train_windows(self) -> None:
        if self.train_windows is not None and max(self.train_windows) > self.window_size:
            self.refuse("train_windows", f"None or a list of sizes from 1 to {self.window_size}")

    @classmethod
    def tiny(cls) -> AHNConfig:
        return cls(segment_size=8, window_size=10, num_sinks=2)


class LayerAHN(nn.Module):
    """One layer's gates, recurrence and output map, which starts at zero: nothing is added before
    training.

    H heads, G states, D the hidden size, Dv a value's width. The form `"gated"` gates what was read
    before it is normed, and has one norm over all heads, as Mamba-2 layers do; the others norm
    every head, then gate.
    """

    def __init__(self, config: AHNConfig, dims: AttentionSizes, sizes: Sizes) -> None:
        super().__init__()
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        heads, width = dims.num_heads, sizes.hidden_size
        count = heads if config.states == "query_head" else dims.num_kv_heads

        def drawn(*shape: int, low: float, high: float) -> Tensor:
            return torch.empty(*shape, **make).uniform_(low, high)

        bound = width**-0.5
        self.write = nn.Parameter(drawn(count, width, low=-bound, high=bound))
        self.forget: nn.Parameter | None = None
        self.rate: nn.Parameter | None = None
        if config.form == "gated_delta":
            self.forget = nn.Parameter(drawn(count, width, low=-bound, high=bound))
        if config.form != "delta":
            self.rate = nn.Parameter(drawn(count, low=RATES[0], high=RATES[1]).log())
            low, high = (math.log(step) for step in STEPS)
            self.bias = nn.Parameter(drawn(count, low=low, high=high).exp().expm1().log())
        self.read = nn.Parameter(drawn(heads, width, low=-bound, high=bound))
        self.read_bias: nn.Parameter | None = None
        if config.form == "gated":
            self.read_bias = nn.Parameter(drawn(heads, low=-bound, high=bound))
        normed = dims.value_dim * (heads if config.form == "gated" else 1)
        self.norm = nn.Parameter(torch.ones(normed, **make))
        self.out = nn.Parameter(torch.zeros(heads, dims.value_dim, dims.value_dim, **make))

    def gates(self, hidden: Tensor) -> Tensor:
        """Compute the strength of the write and the log of the forget gate of tokens `(B, N, D)`:
        `(B, G, N, 2)` in float32 (float64 for float64 parameters); the plain delta rule has no
        second one."""
        wide = torch.promote_types(self.write.dtype, torch.float32)
        hidden = hidden.to(wide)
        write = hidden @ self.write.to(wide).T
        if self.rate is None:
            return write.sigmoid().transpose(1, 2)[..., None]
        forget = write if self.forget is None else hidden @ self.forget.to(wide).T
        step = F.softplus(forget + self.bias.to(wide))
        strength = step if self.forget is None else write.sigmoid()
        rate = self.rate.to(wide).clamp_max(60.0)  # an infinite one times none would be no number
        both = torch.stack([strength, (-rate.exp() * step).clamp_min(_LEAST)], -1)
        return both.transpose(1, 2)

    def scan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gates: Tensor,
        state: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Let tokens enter one after the other, each followed by the query that reads.

        Args:
            query: `(B, H, T, Dk)`.
            key, value: `(B, G, T, ...)` of the tokens that enter.
            gates: `(B, G, T, 1 or 2)` of these, from `gates`.
            state: `(B, G, Dk, Dv)`.
            mask: `(B, T)` bool, where a token enters; None: everywhere.

        Returns:
            What was read `(B, H, T, Dv)`, and the state behind the last token.
        """
        strength, *rest = gates.unbind(-1)
        forget, dtype = rest[0] if rest else None, value.dtype
        if self.read_bias is None:
            return delta.scan(query, key, value, strength, forget, state, l2norm=True, mask=mask)
        query, key = (F.normalize(x.to(gates.dtype), dim=-1).to(dtype) for x in (query, key))
        value = (value * strength[..., None]).to(dtype)
        return gla.scan(query, key, value, forget, state, scale=1.0, mask=mask)

    def output(self, read: Tensor, hidden: Tensor) -> Tensor:
        """Compute what is added to the attention's heads, `(B, T, H, Dv)`, from what was read `(B,
        H, T, Dv)` and the queries' hidden states `(B, T, D)` (eq. 6)."""
        wide = read.dtype
        gate = hidden.to(wide) @ self.read.to(wide).T
        if self.read_bias is None:
            gate = F.silu(gate).transpose(1, 2)[..., None]
            read = F.rms_norm(read, read.shape[-1:], self.norm.to(wide), EPS) * gate
        else:
            gate = F.silu(gate + self.read_bias.to(wide)).transpose(1, 2)[..., None]
            heads = (read * gate).transpose(1, 2).flatten(2)
            heads = F.rms_norm(heads, heads.shape[-1:], self.norm.to(wide), EPS)
            read = heads.unflatten(2, (read.shape[1], -1)).transpose(1, 2)
        return (read @ self.out.to(wide)).transpose(1, 2)


@register(AHNConfig)
class AHNMemory(AttentionMemory):
    """Per layer the recurrence's matrices, in float32, the window's keys and values, and the gates
    that its tokens will enter the recurrence with.

    A query at t sees the window, and reads the state that the token at `t - window_size` has just
    entered. Nothing depends on where segments end.
    """

    claims = Claims(neutral_start=True, linearizes=True)
    sums = ("S",)
    counts_positions = True

    config: AHNConfig
    branches = ("window", "recurrent")
    needs_hidden = True

    def __init__(self, config: AHNConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.window = SlidingWindow(config.window_size, config.num_sinks, kept=config.window_size)
        self.networks = nn.ModuleDict()
        for layer in self._chosen():
            self.networks[str(layer)] = LayerAHN(config, sizes.attention[layer], sizes)

    def _chosen(self) -> list[int]:
        layers = attending_layers(self.config, self.sizes)
        if self.config.layers is not None:
            return layers
        windows = {n: self.sizes.attention[n].window or self.config.window_size for n in layers}
        return [n for n in layers if windows[n] >= self.config.window_size] or layers

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        drawn, sizes = self.config.train_windows, None
        if drawn is not None:
            longest = torch.full((batch_size,), self.config.window_size)
            index = torch.randint(len(drawn), (batch_size,))
            sizes = torch.tensor(drawn)[index] if self.training else longest
        return {
            "layers": {
                str(layer): self._empty(layer, dims, sizes, batch_size, device)
                for layer, dims in self.sizes.attention.items()
            }
        }

    def _empty(
        self, layer: int, dims: AttentionSizes, drawn: Tensor | None, batch: int,
        device: torch.device,
    ) -> Tree:  # fmt: skip
        dtype = self.sizes.backbone_dtype
        window = self.window.empty(batch, dims, dtype, device, sizes=drawn)
        if str(layer) not in self.networks:
            return {"window": window}
        network: Any = self.networks[str(layer)]
        count, wide = len(network.write), torch.promote_types(dtype, torch.float32)
        gates = (batch, count, 0, 1 if network.rate is None else 2)
        window[RECENT]["gates"] = torch.zeros(gates, dtype=wide, device=device)
        shape = (batch, count, dims.key_dim, dims.value_dim)
        return {"window": window, "S": torch.zeros(shape, dtype=wide, device=device)}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield from self.window.ranges(tree["window"], progress)

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        local = self.window.attend(attention, state["window"])[0]
        if str(layer) not in self.networks:
            return local, state
        with torch.autocast(local.device.type, enabled=False):
            recurrent, state = self._recurrent(layer, attention, state)
            recurrent = self.config.capped(recurrent, local)
        if self.branch == "window":
            return local, state
        if self.branch == "recurrent":
            return recurrent, state
        return local.to(recurrent.dtype) + recurrent, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        window, beside = state["window"], {}
        if str(layer) in self.networks:
            network: Any = self.networks[str(layer)]
            with torch.autocast(attention.value.device.type, enabled=False):
                beside["gates"] = network.gates(attention.hidden)
        return {**state, "window": self.window.closed(attention, window, beside)}

    def _recurrent(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        """Read for the step's queries, `(B, T, H, Dv)`; also gives the state after it."""
        network: Any = self.networks[str(layer)]
        window, dtype = state["window"], attention.value.dtype
        hidden: Tensor = attention.hidden  # type: ignore[assignment]
        evicted = self.window.evicted(attention, window)
        key, value = self.window.evicted_key_values(attention, window)
        gates = evicted.rows(
            window[RECENT]["gates"], lambda: network.gates(take(hidden, evicted.columns))
        )
        query = attention.query
        if self.config.rotate:
            query = attention.rotate(query, evicted.query_positions, "in the document")
            key = attention.rotate(key, evicted.positions.clamp_min(0), "evicted")
        if self.config.states == "query_head":
            key, value = (x.repeat_interleave(attention.groups, 1) for x in (key, value))
        entering = attention.cached_per_step(
            ("entering", self.window), lambda: self._entering(attention, evicted)
        )
        query, key, value = (x.to(dtype) for x in (query, key, value))
        read, S = network.scan(query, key, value, gates, state["S"], entering)
        asking = hidden[:, hidden.shape[1] - query.shape[2] :]
        return network.output(read.to(S.dtype), asking), {**state, "S": S}

    def _entering(self, attention: LayerAttention, evicted: Evicted) -> Tensor | None:
        """Tell at which queries a token enters the recurrence; None: at all."""
        entering = attention.query_valid & (evicted.positions >= self.config.num_sinks)
        return None if bool(entering.all()) else entering

    def optimizer_groups(self) -> list[dict[str, Any]]:
        networks: list[Any] = list(self.networks.values())
        still = [p for n in networks if n.rate is not None for p in (n.rate, n.bias)]
        return [{"params": still, "weight_decay": 0.0}] if still else []

    def figures(self) -> dict[str, Tensor]:
        networks: list[Any] = list(self.networks.values())
        return {
            "output_norm": torch.stack([n.out.detach().float().norm(dim=(1, 2)) for n in networks])
        }
