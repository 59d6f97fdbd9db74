"""RMT: recurrent memory tokens (Bulatov, Kuratov, Burtsev 2022; decoder layout)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import PositiveInt
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
    """

    name: ClassVar[str] = "rmt"

    num_memory_tokens: PositiveInt = 16

    @classmethod
    def tiny(cls) -> RMTConfig:
        return cls(segment_size=8, num_memory_tokens=3)


@register(RMTConfig)
class RMTMemory(SoftPrompt):
    """`[memory | segment | memory]`: both ends hold the same m vectors; the backbone's last
    hidden states at the write positions are the memory of the next segment (section 3)."""

    config: RMTConfig

    def __init__(self, config: RMTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.num_prefix = self.num_suffix = config.num_memory_tokens
        self.tokens = memory_tokens(config.num_memory_tokens, sizes)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return {"tokens": self.tokens.to(device).expand(batch_size, -1, -1)}

    def prefix(self, state: Tree) -> Tensor:
        return state["tokens"]

    def suffix(self, state: Tree) -> Tensor:
        return state["tokens"]

    def write_suffix(self, state: Tree, hidden: Tensor) -> Tree:
        return {"tokens": hidden.to(self.tokens.dtype)}
