"""Window with sinks: the last tokens and the first few, nothing else.

LM-Infinite (Han et al. 2023) and StreamingLLM (Xiao et al. 2023): the trivial bounded memory, and
the baseline that every other one must be shown beside. It has no parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.sliding_window import SlidingWindow
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import NonNegativeInt, PositiveInt
from memwrap.memories.sizes import Sizes
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


class WindowConfig(MemoryConfig):
    """Every token attends to the last `window_size` tokens (itself among them) and to the first
    `num_sinks` of the document.

    Examples:
        >>> import memwrap
        >>> memwrap.WindowConfig(window_size=256).num_sinks
        4

    Attributes:
        window_size: tokens of the window. Results do not depend on `segment_size`, which only
            says how many tokens are read at once.
        num_sinks: first tokens that stay visible. Once they have left the window, they are seen
            at the distance that they have in a full cache (StreamingLLM, section 3.2), so that
            distances stay below `window_size + num_sinks`. Layers with a sliding window of their
            own keep it and get no sinks.
    """

    name: ClassVar[str] = "window"

    window_size: PositiveInt = 1024
    num_sinks: NonNegativeInt = 4

    @classmethod
    def tiny(cls) -> WindowConfig:
        return cls(segment_size=8, window_size=12, num_sinks=2)


@register(WindowConfig)
class WindowMemory(AttentionMemory):
    """Per layer the un-rotated keys and the values of the window and of the sinks."""

    claims = Claims(neutral_start=True, whole={"window_size": 128, "num_sinks": 0})

    config: WindowConfig
    within_window = True

    def __init__(self, config: WindowConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.window = SlidingWindow(config.window_size, config.num_sinks)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        dtype = self.sizes.backbone_dtype
        return {
            "layers": {
                str(layer): self.window.empty(batch_size, dims, dtype, device)
                for layer, dims in self.sizes.attention.items()
            }
        }

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for tree in state["layers"].values():
            yield from self.window.ranges(tree, progress)

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        return self.window.attend(attention, state)[0], state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        return self.window.closed(attention, state)
