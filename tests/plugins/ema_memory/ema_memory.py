"""EMA: one vector that follows the mean of what was read."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Claims, SeesSegment, SegmentTokens, SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import Fraction
from memwrap.memories.sizes import Sizes
from memwrap.state.trees import Tree


class EMAConfig(MemoryConfig):
    """One vector that follows the mean of the segments' hidden states.

    Attributes:
        decay: share of the old vector that stays at a write.
    """

    name: ClassVar[str] = "ema"

    decay: Fraction = 0.5


@register(EMAConfig)
class EMAMemory(SoftPrompt, SeesSegment):
    """`[P | segment]`: P is a linear map of the vector; a first segment has no P."""

    config: EMAConfig
    claims = Claims(neutral_start=True)
    looks_at = frozenset({"hidden"})

    def __init__(self, config: EMAConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.num_prefix = 1
        width = sizes.embedding_size
        self.project = nn.Linear(width, width, dtype=sizes.dtype, device=sizes.device)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        width = self.sizes.embedding_size
        return {
            "mean": torch.zeros(batch_size, width, dtype=self.sizes.dtype, device=device),
            "written": torch.zeros(batch_size, dtype=torch.bool, device=device),
        }

    def prefix(self, state: Tree) -> Tensor:
        return self.project(state["mean"])[:, None]

    def prefix_mask(self, state: Tree) -> Tensor:
        return state["written"][:, None]

    def write_segment(self, state: Tree, tokens: SegmentTokens) -> Tree:
        if tokens.hidden is None:
            return state
        valid = tokens.valid.to(tokens.hidden.device)[..., None]
        total = (tokens.hidden.to(self.sizes.dtype) * valid).sum(1)
        mean = total / valid.sum(1).clamp(min=1)
        old, decay = state["mean"], self.config.decay
        mean = torch.where(state["written"][:, None], decay * old + (1 - decay) * mean, mean)
        return {"mean": mean, "written": torch.ones_like(state["written"])}
