"""ARMT: an associative matrix in every layer, written by memory tokens (Rodkin et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Claims, LayerMemory, SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, PositiveInt
from memwrap.memories.sizes import Sizes, chosen_layers, memory_tokens
from memwrap.ops import accumulation_dtype, associative
from memwrap.state.trees import Tree


class ARMTConfig(MemoryConfig):
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
        value_init: `"zero"` (neutral start) or `"normal"` (std 0.02; neutral in the first
            segment only).
        layers: decoder layers that hold a matrix (`None`: all).
    """

    name: ClassVar[str] = "armt"

    num_memory_tokens: PositiveInt = 16
    d_mem: PositiveInt = 64
    nu: PositiveInt = 3
    n_heads: PositiveInt = 1
    feature_norm: bool = False
    use_denom: bool = True
    correction: bool = True
    gating: bool = False
    input_norm: bool = True
    value_init: Literal["zero", "normal"] = "zero"
    layers: LayerList | None = None

    def validate_heads(self) -> None:
        if self.d_mem % self.n_heads:
            self.refuse("n_heads", f"a divisor of d_mem ({self.d_mem})")

    def validate_denominator(self) -> None:
        if not self.use_denom and not self.feature_norm:
            self.refuse("use_denom", "true unless `feature_norm` is true: raw features overflow")

    @classmethod
    def tiny(cls) -> ARMTConfig:
        return cls(segment_size=8, num_memory_tokens=2, d_mem=8)


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
        self.value = nn.Linear(width, width, bias=False, **make)
        self.beta = nn.Linear(width, width if config.gating else config.n_heads, **make)
        if config.value_init == "zero":
            nn.init.zeros_(self.value.weight)
        else:
            nn.init.normal_(self.value.weight, std=0.02)

    def _heads(self, x: Tensor) -> Tensor:
        """Split heads: `(B, T, H * d)` -> `(B, H, T, d)`."""
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)

    def _prepare(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden.to(self.query.weight.dtype))

    def read(self, hidden: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
        """Read what the memory holds for each position: `(B, T, D)` -> `(B, T, D)`."""
        q = self._heads(self.query(self._prepare(hidden)))
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            out = associative.read_projected(q, A, z, nu=config.nu, normalize=config.feature_norm)
        return out.transpose(1, 2).flatten(2)

    def write(self, hidden: Tensor, state: Tree) -> Tree:
        """Write the memory tokens' outputs `(B, m, D)` into `state`."""
        config, A, z = self.config, state["A"], state.get("z")
        x = self._prepare(hidden)
        k, v = self._heads(self.key(x)), self._heads(self.value(x))
        beta = self._heads(torch.sigmoid(self.beta(x).to(A.dtype)))
        with torch.autocast(hidden.device.type, enabled=False):
            new_A, new_z = associative.write_projected(
                k, v, beta, A, z, state["written"], nu=config.nu,
                normalize=config.feature_norm, correction=config.correction,
            )  # fmt: skip
        new: Tree = {"A": new_A, "written": torch.ones_like(state["written"])}
        return new if new_z is None else new | {"z": new_z}


@register(ARMTConfig)
class ARMTMemory(SoftPrompt, LayerMemory):
    """`[segment | memory tokens]`: each layer adds `A q / z q` to what it is given, and its
    outputs at the memory tokens are written into its own A and z (section 3, eq. 1 to 6)."""

    claims = Claims(neutral_start=True)

    config: ARMTConfig

    def __init__(self, config: ARMTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        wanted = chosen_layers(config, sizes)
        if sizes.hidden_size % config.n_heads:
            raise ValueError(
                f"ARMTConfig.n_heads is {config.n_heads}; it must divide the backbone's hidden "
                f"size {sizes.hidden_size}."
            )
        self.num_suffix = config.num_memory_tokens
        self.tokens = memory_tokens(config.num_memory_tokens, sizes)
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
        return hidden + memory.read(hidden, state["A"], state.get("z"))

    def write_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tree:
        memory: Any = self.layers[str(layer)]
        return memory.write(hidden, state)
