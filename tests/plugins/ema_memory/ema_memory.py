"""EMA: one vector that follows the mean of what was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Memory, SegmentTokens
from memwrap.memories.registry import register
from memwrap.memories.sizes import Sizes
from memwrap.state.trees import Tree


@dataclass(kw_only=True)
class EMAConfig(MemoryConfig):
    """One vector that follows the mean of the segments' hidden states.

    Attributes:
        decay: share of the old vector that stays at a write.
    """

    name: ClassVar[str] = "ema"
    places: ClassVar[frozenset[str]] = frozenset({"tokens"})
    neutral_start: ClassVar[bool] = True

    decay: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("decay", 0, 1)

    @property
    def extra_tokens(self) -> int:
        return 1


@register(EMAConfig)
class EMAMemory(Memory):
    """`[P | segment]`: P is a linear map of the vector; a first segment has no P."""

    config: EMAConfig
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

    def closed(self, state: Tree, tokens: SegmentTokens) -> Tree:
        if tokens.hidden is None:
            return state
        valid = tokens.valid.to(tokens.hidden.device)[..., None]
        total = (tokens.hidden.to(self.sizes.dtype) * valid).sum(1)
        mean = total / valid.sum(1).clamp(min=1)
        decay = self.config.decay
        mean = torch.where(
            state["written"][:, None], decay * state["mean"] + (1 - decay) * mean, mean
        )
        return {"mean": mean, "written": torch.ones_like(state["written"])}
