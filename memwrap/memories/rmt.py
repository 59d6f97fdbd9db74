"""RMT: recurrent memory tokens (Bulatov, Kuratov, Burtsev 2022; decoder layout)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Memory
from memwrap.memories.registry import register
from memwrap.memories.settings import PositiveInt
from memwrap.memories.sizes import Sizes, memory_tokens
from memwrap.state.trees import Tree


class RMTConfig(MemoryConfig):
    """Recurrent memory tokens: what a segment leaves in its last positions opens the next.

    Attributes:
        num_memory_tokens: m, read in front of a segment and written behind it.
        published_truncation: reproduce the truncation of the published code, given its
            `max_n_segments`: the edge after segment s is cut iff `s >= 1` and
            `s + bptt_segments <= max_n_segments`. `None`: windows of `bptt_segments`.
    """

    name: ClassVar[str] = "rmt"
    places: ClassVar[frozenset[str]] = frozenset({"tokens"})

    num_memory_tokens: PositiveInt = 16
    published_truncation: PositiveInt | None = None

    @classmethod
    def tiny(cls) -> RMTConfig:
        return cls(segment_size=8, num_memory_tokens=3)

    @property
    def extra_tokens(self) -> int:
        return 2 * self.num_memory_tokens

    def detach_before(self, segment: int) -> bool:
        if self.published_truncation is None or self.bptt_segments is None:
            return super().detach_before(segment)
        done = segment - 1
        return done >= 1 and done + self.bptt_segments <= self.published_truncation


@register(RMTConfig)
class RMTMemory(Memory):
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

    def write(self, state: Tree, hidden: Tensor) -> Tree:
        return {"tokens": hidden.to(self.tokens.dtype)}
