"""Window with sinks: the last tokens and the first few, nothing else.

LM-Infinite (Han et al. 2023) and StreamingLLM (Xiao et al. 2023): the trivial bounded memory, and
the baseline that every other one must be shown beside. It has no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention, Rows
from memwrap.memories.base import Memory, MemoryConfig, Sizes
from memwrap.ops.rows import earliest, latest, right_valid, take
from memwrap.registry import register
from memwrap.trees import Tree


@dataclass(kw_only=True)
class WindowConfig(MemoryConfig):
    """Every token attends to the last `window_size` tokens (itself among them) and to the first
    `num_sinks` of the document.

    Attributes:
        window_size: tokens of the window. Results do not depend on `segment_size`, which only
            says how many tokens are read at once.
        num_sinks: first tokens that stay visible. Once they have left the window, they are seen
            at the distance that they have in a full cache (StreamingLLM, section 3.2), so that
            distances stay below `window_size + num_sinks`. Layers with a sliding window of their
            own keep it and get no sinks.
    """

    name: ClassVar[str] = "window"
    places: ClassVar[frozenset[str]] = frozenset({"attention"})
    neutral_start: ClassVar[bool] = True

    window_size: int = 1024
    num_sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("window_size")
        self._positive("num_sinks", zero=True)

    @classmethod
    def tiny(cls) -> WindowConfig:
        return cls(segment_size=8, window_size=12, num_sinks=2)


@register(WindowConfig)
class WindowMemory(Memory):
    """Per layer the un-rotated keys and the values of the window and of the sinks."""

    config: WindowConfig

    def __init__(self, config: WindowConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.kept = config.window_size - 1  # a query sees itself too

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        make: dict[str, Any] = {"device": device, "dtype": self.sizes.backbone_dtype}
        layers: Tree = {}
        for layer, own in enumerate(self.sizes.attention):
            for name, count in (("window", self.kept), ("sink", self.config.num_sinks)):
                shape = (batch_size, own.num_kv_heads, count)
                layers.setdefault(str(layer), {}).update(
                    {
                        f"{name}_key": torch.zeros(*shape, own.key_dim, **make),
                        f"{name}_value": torch.zeros(*shape, own.value_dim, **make),
                    }
                )
            layers[str(layer)]["tokens"] = torch.zeros(batch_size, dtype=torch.long, device=device)
        return {"layers": layers}

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        config, places, before = self.config, attention.places, state["tokens"]
        window = min(config.window_size, attention.window or config.window_size)
        positions = torch.arange(-self.kept, 0, device=before.device).expand(len(before), -1)
        recent = places.queries[:, :, None] - positions[:, None] < window
        recent &= right_valid(before, self.kept)[:, None]
        rows = [Rows(state["window_key"], state["window_value"], positions, recent)]
        if config.num_sinks and attention.window is None:
            rows.insert(0, self._sink_rows(attention, state, window))
        local = places.queries[:, :, None] - places.keys[:, None] < window
        return attention.join(*rows, local=local)[0], state

    def close_layer(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        before, valid = state["tokens"], attention.places.key_valid
        tokens = before + valid.sum(1)
        kept = latest(torch.cat([right_valid(before, self.kept), valid], 1), self.kept)
        there = right_valid(tokens, self.kept)
        new = {"tokens": tokens}
        for name, rows in (("key", attention.key), ("value", attention.value)):
            old = state[f"window_{name}"]
            new[f"window_{name}"] = take(torch.cat([old, rows.to(old.dtype)], 2), kept, there)
        return new | self._sinks(attention, state)

    def _sinks(self, attention: LayerAttention, state: Tree) -> Tree:
        """Keys and values of the document's first tokens, those just read among them."""
        before, valid = state["tokens"], attention.places.key_valid
        places = torch.arange(self.config.num_sinks, device=before.device)
        index = earliest(torch.cat([places < before[:, None], valid], 1), self.config.num_sinks)
        there = places < (before + valid.sum(1))[:, None]
        return {
            name: take(torch.cat([state[name], new.to(state[name].dtype)], 2), index, there)
            for name, new in (("sink_key", attention.key), ("sink_value", attention.value))
        }

    def _sink_rows(self, attention: LayerAttention, state: Tree, window: int) -> Rows:
        """The sinks as queries see them that have left them behind the window."""
        sinks = self._sinks(attention, state)
        absolute = state["tokens"][:, None] + attention.places.queries
        places = torch.arange(self.config.num_sinks, device=absolute.device)
        gone = absolute[:, :, None] - places >= window
        return Rows(
            sinks["sink_key"],
            sinks["sink_value"],
            places.expand(len(absolute), -1),
            gone,
            query_positions=absolute.clamp_max(window + self.config.num_sinks - 1),
        )
