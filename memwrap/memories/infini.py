"""Infini-attention: a compressive memory in every attention (Munkhdalai et al. 2024)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.backbones import LayerAttention
from memwrap.memories.parts.sums import SummedConfig
from memwrap.memories.protocol import AttentionMemory, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import GateLogit, LayerList, NonNegativeFloat
from memwrap.memories.sizes import Sizes, attending_layers
from memwrap.ops import accumulation_dtype, infini
from memwrap.state.trees import Tree


class InfiniConfig(SummedConfig):
    """Infini-attention: keys and values of closed segments are summed into one matrix a KV head,
    read with the layer's own queries and mixed with local attention by a gate a query head.

    Examples:
        >>> import memwrap
        >>> memwrap.InfiniConfig(update="delta").segment_size
        512

    Attributes:
        update: `"linear"` (eq. 4) or `"delta"`, which first subtracts what the memory returns
            for a key (eq. 5).
        gate_init: beta before training; the gate is sigmoid(beta). -3 leaves a wrapped model near
            its base. 0 halves its local attention; far below -6 no gradient reaches the gate.
        gate_learning_rate: learning rate of the gates, in an optimizer group without weight
            decay. With the model's own rate they hardly move.
        first_segment: `"local_only"` leaves the gate out while the memory is empty, so that one
            segment gives what the base gives; `"zero_gated"` applies it to a read of zero.
        layers: decoder layers that have a memory (`None`: all).
    """

    name: ClassVar[str] = "infini"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"gate_init", "gate_learning_rate"})

    update: Literal["linear", "delta"] = "linear"
    gate_init: GateLogit = -3.0
    gate_learning_rate: NonNegativeFloat = 1e-2
    first_segment: Literal["local_only", "zero_gated"] = "local_only"
    layers: LayerList | None = None


@register(InfiniConfig)
class InfiniMemory(AttentionMemory):
    """Per layer and KV head a matrix M `(Dk, Dv)` and a normaliser z `(Dk,)`, in float32.

    A segment reads `phi(q) M / (phi(q) z)` with phi = ELU + 1 from the memory as it was before it
    (eq. 3), mixes it with local attention (eq. 6), and is added when it closes (eq. 4, 5). Keys
    and queries are un-rotated there: the memory holds no order.
    """

    claims = Claims(neutral_start=True)
    sums = ("M", "z")

    config: InfiniConfig

    def __init__(self, config: InfiniConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.gates = nn.ParameterDict()
        for layer in attending_layers(config, sizes):
            beta = torch.full((sizes.attention[layer].num_heads,), float(config.gate_init))
            self.gates[str(layer)] = nn.Parameter(beta.to(sizes.device, sizes.dtype))

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        make: dict[str, Any] = {"device": device, "dtype": accumulation_dtype(self._any)}
        layers: Tree = {}
        for name in self.gates:
            dims = self.sizes.attention[int(name)]
            shape = (batch_size, dims.num_kv_heads, dims.key_dim)
            layers[name] = {
                "M": torch.zeros(*shape, dims.value_dim, **make),
                "z": torch.zeros(shape, **make),
                "written": torch.zeros(batch_size, dtype=torch.bool, device=device),
            }
        return {"layers": layers}

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        local = attention.local()
        with torch.autocast(local.device.type, enabled=False):
            read = infini.read(attention.query, state["M"], state["z"]).transpose(1, 2)
            read = self.config.capped(read, local)
            gate = torch.sigmoid(self.gates[str(layer)].to(read.dtype))[:, None]
            if self.config.first_segment == "local_only":
                gate = torch.where(state["written"].view(-1, 1, 1, 1), gate, 0.0)
            mixed = gate * read + (1 - gate) * local.to(read.dtype)
        return mixed, state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        with torch.autocast(attention.value.device.type, enabled=False):
            M, z = infini.write(
                attention.key, attention.value, state["M"], state["z"],
                update=self.config.update, mask=attention.key_valid,
            )  # fmt: skip
        return {"M": M, "z": z, "written": torch.ones_like(state["written"])}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        rate = self.config.gate_learning_rate
        return [{"params": list(self.gates.parameters()), "lr": rate, "weight_decay": 0.0}]

    def figures(self) -> dict[str, Tensor]:
        return {
            "gate": torch.sigmoid(torch.stack([g.detach().float() for g in self.gates.values()]))
        }

    @property
    def _any(self) -> Tensor:
        return next(iter(self.gates.values()))
