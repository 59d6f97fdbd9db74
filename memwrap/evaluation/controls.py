"""What a memory is measured beside: read controls, and the backbone without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from memwrap.backbones.adapters import lora_disabled
from memwrap.engine.inputs import check_inputs
from memwrap.engine.loop import Loop
from memwrap.engine.step import SegmentReader
from memwrap.memories.window import WindowConfig, WindowMemory
from memwrap.model.building import sizes_of
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState

MEMORY, OFF, SHUFFLED = "memory", "memory off", "memory shuffled"


TRUNCATED, FULL, WINDOW = "base, truncated", "base, full context", "base, window + sinks"


CURVES = (MEMORY, OFF, SHUFFLED, TRUNCATED, FULL, WINDOW)


SINKS = 4
FEWEST = 64  # tokens of a window that are read at once


def own_context(model: MemoryModelForCausalLM) -> int:
    """Count the tokens that the backbone alone was trained to see at once."""
    return int(model.parts.config.max_position_embeddings)


class WindowFeed:
    """Logits `(batch, T, V)` of ids and mask `(batch, T)` that are fed one after another.

    Attributes:
        state: what was fed; one of before may be put back.
    """

    def __init__(self, loop: Loop, state: MemoryState, head: Callable[[Tensor], Tensor]) -> None:
        self.loop, self.state, self.head = loop, state, head

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        reading = self.loop(check_inputs(ids, None, mask), self.state, hidden_from=0)
        self.state = reading.state
        return self.head(reading.hidden)  # type: ignore[arg-type]


@contextmanager
def windowed(
    model: MemoryModelForCausalLM, window: int, batch: int
) -> Iterator[tuple[WindowFeed, int]]:
    """Make the backbone alone see a sliding window and the first tokens (StreamingLLM).

    Args:
        model: whose backbone reads, without its adapters and memories.
        window: tokens that are seen, sinks among them.
        batch: rows.

    Yields:
        What ids are fed to, and how many are best fed at once.

    Raises:
        ValueError: where the backbone's attention cannot meet a memory.
    """
    # Results do not depend on how much is read at once, and little pieces are slow.
    size = max(window // 4, min(window, FEWEST))
    config = WindowConfig(segment_size=size, window_size=max(1, window - SINKS), num_sinks=SINKS)
    with lora_disabled(model.backbone), model.parts.attention_lent():
        memory = WindowMemory(config, sizes_of(model.parts, attention=True)).to(model.device)
        reader = SegmentReader(model.parts, {config.name: memory})
        state = MemoryState(reader.init_states(batch, model.device), batch)
        yield WindowFeed(Loop(reader, config), state, model.parts.head), config.segment_size


__all__ = [
    "CURVES", "FULL", "MEMORY", "OFF", "SHUFFLED", "SINKS", "TRUNCATED", "WINDOW", "WindowFeed",
    "lora_disabled", "own_context", "windowed",
]  # fmt: skip
