"""RMT: recurrent memory tokens (Bulatov, Kuratov, Burtsev 2022; decoder layout), with the gates of
the Block-Recurrent Transformer (Hutchins et al. 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import GateLogit, PositiveInt
from memwrap.memories.sizes import Sizes, memory_tokens
from memwrap.state.trees import Tree


class RMTConfig(MemoryConfig):
    """Recurrent memory tokens: what a segment leaves in its last positions opens the next.

    Examples:
        >>> import memwrap
        >>> memwrap.RMTConfig(num_memory_tokens=8).segment_size
        512

    Attributes:
        num_memory_tokens: m, read in front of a segment and written behind it.
        gate: what of the old memory stays when a segment writes: `"bias"`, a learned share a
            channel; `"lstm"`, shares that the outputs at the write positions decide; `None`:
            nothing, as RMT has it.
        gate_init: the logit of the share that stays at the start, of `"bias"`: -4 begins near RMT.
    """

    name: ClassVar[str] = "rmt"

    not_in_state: ClassVar[frozenset[str]] = frozenset({"gate_init"})

    num_memory_tokens: PositiveInt = 16
    gate: Literal["bias", "lstm"] | None = None
    gate_init: GateLogit = -4.0

    @classmethod
    def tiny(cls) -> RMTConfig:
        return cls(segment_size=8, num_memory_tokens=3)


class LSTMGate(nn.Module):
    """A gate that forgets, and one that lets in, for every token and channel."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.embedding_size
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        self.forget = nn.Linear(width, width, **make)
        self.enter = nn.Linear(width, width, **make)
        self.new = nn.Linear(width, width, bias=False, **make)
        for gate in (self.forget, self.enter):
            nn.init.zeros_(gate.bias)

    def forward(self, memory: Tensor, hidden: Tensor) -> Tensor:
        """Compute the new memory `(B, m, D)` of the old one and the outputs `(B, m, D)`."""
        kept = torch.sigmoid(self.forget(hidden) + 1)
        return memory * kept + torch.tanh(self.new(hidden)) * torch.sigmoid(self.enter(hidden) - 1)


@register(RMTConfig)
class RMTMemory(SoftPrompt):
    """`[memory | segment | memory]`: both ends hold the same m vectors; the backbone's last
    hidden states at the write positions are the memory of the next segment (section 3)."""

    config: RMTConfig

    def __init__(self, config: RMTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.num_prefix = self.num_suffix = config.num_memory_tokens
        self.tokens = memory_tokens(config.num_memory_tokens, sizes)
        self.share: nn.Parameter | None = None
        if config.gate == "bias":
            self.share = nn.Parameter(torch.full_like(self.tokens[0], config.gate_init))
        self.lstm = LSTMGate(sizes) if config.gate == "lstm" else None

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return {"tokens": self.tokens.to(device).expand(batch_size, -1, -1)}

    def prefix(self, state: Tree) -> Tensor:
        return state["tokens"]

    def suffix(self, state: Tree) -> Tensor:
        return state["tokens"]

    def write_suffix(self, state: Tree, hidden: Tensor) -> Tree:
        hidden, memory = hidden.to(self.tokens.dtype), state["tokens"]
        if self.share is not None:
            share = self.share.sigmoid()
            hidden = share * memory + (1 - share) * hidden
        elif self.lstm is not None:
            hidden = self.lstm(memory, hidden)
        return {"tokens": hidden}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [] if self.share is None else [{"params": [self.share], "weight_decay": 0.0}]
