"""Window with sinks: the last tokens and the first few, nothing else.

LM-Infinite (Han et al. 2023) and StreamingLLM (Xiao et al. 2023): the trivial bounded memory, and
the baseline that every other one must be shown beside. It has no parameters. Its policies are those
of MASFormer (Zhang et al. 2023) and SWAA (Yu et al. 2025): which layers have the window, and
whether the tokens of an answer have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.sliding_window import SlidingWindow
from memwrap.memories.parts.whole_past import WholePast
from memwrap.memories.protocol import AttentionMemory, Bounds, Claims
from memwrap.memories.registry import register
from memwrap.memories.settings import LayerList, NonNegativeInt, PositiveInt
from memwrap.memories.sizes import Sizes, attending_layers
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
        layers: decoder layers with the window, as a list, or every second one from the first on
            (`"alternate"`); the others keep every key, as the base does, in a state that grows.
            `None`: all.
        decode: what tokens of an answer see: the `"window"`, as all others do, or in `"full"` all
            that was read, for which every layer keeps every key. Answers are what is generated,
            and what comes from `answer_from` on (default: from the first label on, where labels in
            front of it are ignored).
    """

    name: ClassVar[str] = "window"

    window_size: PositiveInt = 1024
    num_sinks: NonNegativeInt = 4
    layers: LayerList | Literal["alternate"] | None = None
    decode: Literal["window", "full"] = "window"

    @classmethod
    def tiny(cls) -> WindowConfig:
        return cls(segment_size=8, window_size=12, num_sinks=2)


@register(WindowConfig)
class WindowMemory(AttentionMemory):
    """Per layer the un-rotated keys and the values of the window and of the sinks, or of all that
    was read."""

    claims = Claims(neutral_start=True, whole={"window_size": 128, "num_sinks": 0})

    config: WindowConfig
    within_window = True

    def __init__(self, config: WindowConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        whole = config.decode == "full"
        self.tells_answers = whole
        kept = 0 if whole else config.window_size - 1
        self.window = SlidingWindow(config.window_size, config.num_sinks, kept)
        self.reaches = self.window.reaches
        self.windowed = self._windowed()
        layers = sizes.attention if whole else sizes.attention.keys() - self.windowed
        self.whole = {n: WholePast.of(sizes.attention[n]) for n in sorted(layers)}
        self.bytes_per_token = sum(
            past.bytes_per_token(sizes.attention[n], sizes.backbone_dtype)
            for n, past in self.whole.items()
        )
        if self.whole:
            bounded = not self.bytes_per_token
            self.claims = replace(self.claims, bounded=bounded, lengthens=True)  # type: ignore[misc]

    def _windowed(self) -> set[int]:
        """Choose the layers with the window."""
        if self.config.layers == "alternate":
            return set(list(self.sizes.attention)[::2])
        return set(attending_layers(self.config, self.sizes))

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        dtype, layers = self.sizes.backbone_dtype, {}
        for layer, dims in self.sizes.attention.items():
            tree: Tree = {}
            if layer in self.windowed:
                tree |= self.window.empty(batch_size, dims, dtype, device)
            if layer in self.whole:
                tree |= self.whole[layer].empty(batch_size, dims, dtype, device)
            layers[str(layer)] = tree
        return {"layers": layers}

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        for name, tree in state["layers"].items():
            if int(name) in self.windowed:
                yield from self.window.ranges(tree, progress)
            if int(name) in self.whole:
                yield from self.whole[int(name)].ranges(tree, progress)

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        past = self.whole.get(layer)
        if past is None:
            return self.window.attend(attention, state)[0], state
        if layer not in self.windowed:
            rows = past.read(attention, state, None, None)
            return attention.join(rows, name=("whole", past))[0], state
        return self._until_answered(attention, state, past), state

    def _until_answered(self, attention: LayerAttention, state: Tree, past: WholePast) -> Tensor:
        """Attend to window and sinks, and in an answer to all that was read."""
        window, answers = self.window, attention.answers
        name = ("answered", window, past)
        masks = attention.cached_per_step(name, lambda: window.masks(attention, state))
        rows = past.read(attention, state, window.size, answers)
        local, sinks = masks.local, masks.sinks
        if answers is not None:
            local, sinks = local | answers[:, :, None], sinks & ~answers[:, :, None]
        if not window.num_sinks or attention.window is not None:
            return attention.join(rows, local=local, name=name)[0]
        key, value = window.sinks(attention, state)
        first = MemoryKeyValues(key, value, masks.sink_positions, sinks, masks.query_positions)
        return attention.join(first, rows, local=local, name=name)[0]

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        if layer in self.windowed:
            state = self.window.closed(attention, state)
        past = self.whole.get(layer)
        return state if past is None else past.closed(attention, state)
