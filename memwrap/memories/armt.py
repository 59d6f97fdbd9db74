"""ARMT: an associative matrix in every layer, written by memory tokens (Rodkin et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.memories.parts.sums import SummedConfig
from memwrap.memories.protocol import Claims, LayerMemory, SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import GateLogit, LayerList, PositiveInt
from memwrap.memories.sizes import Sizes, chosen_layers, late_layers, memory_tokens
from memwrap.ops import accumulation_dtype, associative
from memwrap.state.trees import Tree


class ARMTConfig(SummedConfig):
    """Associative recurrent memory: every layer reads a key-value matrix that memory tokens
    write at the end of each segment.

    Examples:
        >>> import memwrap
        >>> memwrap.ARMTConfig(segment_size=1024).num_memory_tokens
        16

    Attributes:
        num_memory_tokens: m, appended to every segment (the same learned tokens each time).
        d_mem: width of queries and keys before the feature map.
        nu: rolls of DPFP; a key has `2 * nu * d_mem` features.
        n_heads: heads of the matrix, a divisor of `d_mem` and the hidden size; 1 in the paper.
        feature_norm: divide features by their L2 norm (later code; off in the paper).
        use_denom: divide reads by `z q`; off gives the plain delta rule. Needs
            `feature_norm` when off.
        correction: gamma of the paper; off sets it to 1.
        gating: one write strength a value channel rather than a head.
        input_norm: RMSNorm in front of the memory's projections. Not in the paper; without it
            the zero-initialised values hardly start to learn. Off for published weights.
        value_init: `"zero"` (neutral start), `"normal"` (std 0.02) or `"identity"`: what is written
            is the layer's own output, normalised, and keys begin as copies of the queries. The
            last two are neutral in the first segment only.
        layers: decoder layers that hold a matrix: numbers, `"late"` (every second one of the last
            fifth) or `None` (all).
        read_scale: `"hidden"`: what is read is multiplied by a learned gate of the layer and by the
            RMS of the hidden state that it is added to. `"raw"`: added as it is, as published.
        gate_init: that gate at the start.
        token_gate: the gate is also multiplied by a learned share in (0, 1) for each token, so that
            tokens that ask nothing are left as they are. Needs `read_scale="hidden"`.
        written_tokens: only the last so many memory tokens are written (`None`: all).
        tokens_read: memory tokens read the matrix before they write to it, as published. Off: what
            they write is not what they have just read, once more.
        train_tokens: off leaves the memory tokens as they began, such as the embeddings of a text
            (`start.text` of a recipe).
    """

    name: ClassVar[str] = "armt"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"value_init", "gate_init", "train_tokens"})

    num_memory_tokens: PositiveInt = 16
    d_mem: PositiveInt = 64
    nu: PositiveInt = 3
    n_heads: PositiveInt = 1
    feature_norm: bool = False
    use_denom: bool = True
    correction: bool = True
    gating: bool = False
    input_norm: bool = True
    value_init: Literal["zero", "normal", "identity"] = "zero"
    layers: LayerList | Literal["late"] | None = None
    read_scale: Literal["hidden", "raw"] = "hidden"
    gate_init: GateLogit = 1.0
    token_gate: bool = False
    written_tokens: PositiveInt | None = None
    tokens_read: bool = True
    train_tokens: bool = True

    def validate_heads(self) -> None:
        if self.d_mem % self.n_heads:
            self.refuse("n_heads", f"a divisor of d_mem ({self.d_mem})")

    def validate_denominator(self) -> None:
        if not self.use_denom and not self.feature_norm:
            self.refuse("use_denom", "true unless `feature_norm` is true: raw features overflow")

    def validate_written(self) -> None:
        if self.written_tokens is not None and self.written_tokens > self.num_memory_tokens:
            self.refuse("written_tokens", f"at most num_memory_tokens ({self.num_memory_tokens})")

    def validate_identity(self) -> None:
        if self.value_init == "identity" and not self.input_norm:
            self.refuse("value_init", "another one without input_norm: values would not be bounded")

    def validate_token_gate(self) -> None:
        if self.token_gate and self.read_scale == "raw":
            self.refuse("token_gate", 'false with read_scale="raw": there is no gate')

    @classmethod
    def on_pretrained(cls) -> dict[str, Any]:
        return {"layers": "late"}

    @classmethod
    def tiny(cls) -> ARMTConfig:
        return cls(segment_size=8, num_memory_tokens=2, d_mem=12)


class AssociativeLayer(nn.Module):
    """The projections of one layer's matrix: W_mq, W_mk, W_mv, W_mb of the paper."""

    def __init__(self, config: ARMTConfig, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        self.config = config
        self.norm = nn.RMSNorm(width, eps=1e-6, **make) if config.input_norm else nn.Identity()
        self.query = nn.Linear(width, config.d_mem, bias=False, **make)
        self.key = nn.Linear(width, config.d_mem, bias=False, **make)
        identity = config.value_init == "identity"
        self.value = nn.Linear(width, width, bias=identity, **make)
        self.beta = nn.Linear(width, width if config.gating else config.n_heads, **make)
        if config.value_init == "zero":
            nn.init.zeros_(self.value.weight)
        elif identity:
            nn.init.eye_(self.value.weight)
            nn.init.zeros_(self.value.bias)
            self.key.weight.data.copy_(self.query.weight.data)
        else:
            nn.init.normal_(self.value.weight, std=0.02)
        if config.read_scale == "hidden":
            self.gate = nn.Parameter(torch.full((1,), config.gate_init, **make))
        if config.token_gate:
            self.share = nn.Linear(width, 1, **make)
            nn.init.zeros_(self.share.weight)
            nn.init.constant_(self.share.bias, 2.0)  # open: shares of 0.88

    def _heads(self, x: Tensor) -> Tensor:
        """Split heads: `(B, T, H * d)` -> `(B, H, T, d)`."""
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)

    def _prepare(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.to(self.query.weight.dtype))

    def read(self, hidden: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
        """Read what the memory holds for each position: `(B, T, D)` -> `(B, T, D)`."""
        x = self._prepare(hidden)
        q = self._heads(self.query(x))
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            out = associative.read_projected(q, A, z, nu=config.nu, normalize=config.feature_norm)
        out = out.transpose(1, 2).flatten(2)
        if config.read_scale == "raw":
            return out
        scale = (hidden.to(out.dtype).square().mean(-1, keepdim=True) + 1e-12).sqrt()
        gate = self.gate.to(out.dtype)
        if config.token_gate:
            gate = gate * torch.sigmoid(self.share(x).to(out.dtype))
        return gate * scale * out

    def write(self, hidden: Tensor, state: Tree) -> Tree:
        """Write the memory tokens' outputs `(B, m, D)` into `state`."""
        config, A, z = self.config, state["A"], state.get("z")
        x = self._prepare(hidden[:, -(config.written_tokens or config.num_memory_tokens) :])
        k, v = self._heads(self.key(x)), self._heads(self.value(x))
        beta = self._heads(torch.sigmoid(self.beta(x).to(A.dtype)))
        with torch.autocast(hidden.device.type, enabled=False):
            new_A, new_z = associative.write_projected(
                k, v, beta, A, z, state["written"], nu=config.nu,
                normalize=config.feature_norm, correction=config.correction,
            )  # fmt: skip
        new: Tree = {"A": new_A, "written": torch.ones_like(state["written"])}
        return new if new_z is None else new | {"z": new_z}

    @torch.no_grad()
    def start(self, hidden: Tensor, worth: Tensor) -> None:
        """Start from the outputs `(N, m, D)` at the memory tokens of N segments, of which those in
        `worth` `(N,)` bool hold what is to be remembered: values lose what all segments have in
        common, and the write strength tells the two kinds apart (a linear discriminant)."""
        config = self.config
        x = self._prepare(hidden[:, -(config.written_tokens or config.num_memory_tokens) :])
        if self.value.bias is not None:
            common = self.value(x).float().mean((0, 1)) - self.value.bias
            self.value.bias.copy_(-common)
        x, kinds = x.flatten(0, 1).float(), worth.repeat_interleave(x.shape[1])
        if not bool(kinds.any()) or bool(kinds.all()):
            return
        weight, bias = discriminant(x, kinds)
        self.beta.weight.copy_(weight.expand_as(self.beta.weight))
        self.beta.bias.copy_(bias.expand_as(self.beta.bias))


def discriminant(x: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a linear discriminant to `x` `(N, D)` of two `kinds` `(N,)`.

    Its covariance is shrunk by half to the mean variance: N is mostly smaller than D.

    Returns:
        Weight `(D,)` and bias, at +3 for the mean of the kind that is true and -3 for the other.
    """
    means = [x[kinds == kind].mean(0) for kind in (True, False)]
    centred = torch.cat(
        [x[kinds == kind] - mean for kind, mean in zip((True, False), means, strict=True)]
    )
    covariance = centred.T @ centred / len(x)
    spread = covariance.diagonal().mean().clamp_min(1e-8)
    shrunk = covariance / 2 + torch.eye(x.shape[1], device=x.device) * spread / 2
    between = means[0] - means[1]
    weight = torch.linalg.solve(shrunk, between)
    weight = weight * 6 / (weight @ between).clamp_min(1e-8)
    return weight, -(weight @ (means[0] + means[1])) / 2


@register(ARMTConfig)
class ARMTMemory(SoftPrompt, LayerMemory):
    """`[segment | memory tokens]`: each layer adds `A q / z q` to what it is given, and its
    outputs at the memory tokens are written into its own A and z (section 3, eq. 1 to 6)."""

    claims = Claims(neutral_start=True)
    sums = ("A", "z")

    config: ARMTConfig

    def __init__(self, config: ARMTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        late = config.layers == "late"
        wanted = late_layers(sizes) if late else chosen_layers(config, sizes)
        if sizes.hidden_size % config.n_heads:
            raise ValueError(
                f"ARMTConfig.n_heads is {config.n_heads}; it must divide the backbone's hidden "
                f"size {sizes.hidden_size}."
            )
        self.num_suffix = config.num_memory_tokens
        self.suffix_reads = config.tokens_read
        self.tokens = memory_tokens(config.num_memory_tokens, sizes)
        self.tokens.requires_grad_(config.train_tokens)
        self.layers = nn.ModuleDict({str(i): AssociativeLayer(config, sizes) for i in wanted})

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        config, heads = self.config, self.config.n_heads
        features = 2 * config.nu * config.d_mem // heads
        dtype = accumulation_dtype(self.tokens)
        layers: Tree = {}
        for name in self.layers:
            shape = (batch_size, heads, features, self.sizes.hidden_size // heads)
            layer: Tree = {
                "A": torch.zeros(shape, dtype=dtype, device=device),
                "written": torch.zeros(batch_size, dtype=torch.bool, device=device),
            }
            if config.use_denom:
                layer["z"] = torch.zeros(shape[:3], dtype=dtype, device=device)
            layers[name] = layer
        return {"layers": layers}

    def suffix(self, state: Tree) -> Tensor:
        first = next(iter(state["layers"].values()))
        return self.tokens.expand(first["written"].shape[0], -1, -1)

    def read_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tensor:
        memory: Any = self.layers[str(layer)]
        read = memory.read(hidden, state["A"], state.get("z"))
        return hidden + self.config.capped(read, hidden)

    def write_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tree:
        memory: Any = self.layers[str(layer)]
        return memory.write(hidden, state)

    def start_tokens(self, embeds: Tensor) -> None:
        self.tokens.data.copy_(embeds)

    def start_layer(self, layer: int, hidden: Tensor, worth: Tensor) -> None:
        memory: Any = self.layers[str(layer)]
        memory.start(hidden, worth)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Let gates move faster and values slower: Adam's first step moves every entry of a matrix
        by the rate, and what is read by rate x width relative to the hidden state."""
        if self.config.read_scale == "raw":
            return []
        layers: list[Any] = list(self.layers.values())
        slower = min(1.0, 64 / self.sizes.hidden_size)
        return [
            {"params": [layer.gate for layer in layers], "lr_scale": 20.0, "weight_decay": 0.0},
            {"params": [layer.value.weight for layer in layers], "lr_scale": slower},
        ]

    def figures(self) -> dict[str, Tensor]:
        if self.config.read_scale == "raw":
            return {}
        layers: list[Any] = list(self.layers.values())
        return {"gate": torch.stack([layer.gate.detach().float() for layer in layers])}
