"""MemoryPrompt: a small recurrent network writes prefix vectors (Rakotonirina, Baroni 2024)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Claims, SeesSegment, SegmentTokens, SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import PositiveInt
from memwrap.memories.sizes import Sizes, memory_tokens
from memwrap.ops.buffers import left_aligned
from memwrap.state.trees import Tree


class MemoryPromptConfig(MemoryConfig):
    """A recurrent network beside a frozen model: it is told how each segment ended, and writes
    vectors that open the next one.

    Examples:
        >>> import memwrap
        >>> memwrap.MemoryPromptConfig(pooling="mean").num_memory_tokens
        5

    Attributes:
        num_memory_tokens: m, vectors in front of a segment.
        memory_size: width of the LSTM; its state is turned into the m vectors by a matrix.
            `None`, as published: m times the embedding width, used as the vectors themselves.
        mlp_size: width of the MLP between the backbone and the LSTM.
        pooling: what the LSTM is told: the last hidden state of the segment's `"last"` token,
            or the `"mean"` over its tokens.
    """

    name: ClassVar[str] = "memoryprompt"

    num_memory_tokens: PositiveInt = 5
    memory_size: PositiveInt | None = 512
    mlp_size: PositiveInt = 1024
    pooling: Literal["last", "mean"] = "last"

    @classmethod
    def tiny(cls) -> MemoryPromptConfig:
        return cls(segment_size=8, num_memory_tokens=2, memory_size=16, mlp_size=12)


@register(MemoryPromptConfig)
class MemoryPromptMemory(SoftPrompt, SeesSegment):
    """`[P | segment]`: P is made of the state of an LSTM whose input is the segment's end, seen
    through an MLP (section 3). A first segment has no P."""

    claims = Claims(neutral_start=True)

    config: MemoryPromptConfig
    looks_at = frozenset({"hidden"})

    def __init__(self, config: MemoryPromptConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.num_prefix = config.num_memory_tokens
        width, prefix = sizes.embedding_size, config.num_memory_tokens * sizes.embedding_size
        make: dict[str, Any] = {"dtype": sizes.dtype, "device": sizes.device}
        self.size = config.memory_size or prefix
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_size, **make),
            nn.ReLU(),
            nn.Linear(config.mlp_size, config.mlp_size, **make),
        )
        self.lstm = nn.LSTMCell(config.mlp_size, self.size, **make)
        self.tokens = self.project = None
        if config.memory_size is not None:
            # The vectors begin at the scale of embeddings, whatever the LSTM's.
            self.tokens = memory_tokens(config.num_memory_tokens, sizes)
            self.project = nn.Linear(self.size, prefix, bias=False, **make)
            nn.init.normal_(self.project.weight, std=float(self.tokens.detach().std()))

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        empty = torch.zeros(batch_size, self.size, dtype=self.sizes.dtype, device=device)
        written = torch.zeros(batch_size, dtype=torch.bool, device=device)
        return {"hidden": empty, "cell": empty, "written": written}

    def prefix(self, state: Tree) -> Tensor:
        hidden = state["hidden"]
        if self.project is None or self.tokens is None:
            return hidden.unflatten(-1, (self.num_prefix, -1))
        return self.tokens + self.project(hidden).unflatten(-1, (self.num_prefix, -1))

    def prefix_mask(self, state: Tree) -> Tensor:
        return state["written"][:, None].expand(-1, self.num_prefix)

    def write_segment(self, state: Tree, tokens: SegmentTokens) -> Tree:
        if tokens.hidden is None:
            return state
        valid = tokens.valid.to(tokens.hidden.device)
        if self.config.pooling == "last":
            told = left_aligned.take_last(tokens.hidden, valid, 1, 1)[0][:, 0]
        else:
            told = (tokens.hidden * valid[..., None]).sum(1) / valid.sum(1).clamp(min=1)[:, None]
        with torch.autocast(told.device.type, enabled=False):
            before = state["hidden"], state["cell"]
            hidden, cell = self.lstm(self.mlp(told.to(self.sizes.dtype)), before)
        return {"hidden": hidden, "cell": cell, "written": torch.ones_like(state["written"])}
