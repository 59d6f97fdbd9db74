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


def own_context(model: MemoryModelForCausalLM) -> int:
    """Count the tokens that the backbone alone was trained to see at once."""
    return int(model.parts.config.max_position_embeddings)


@contextmanager
def windowed(
    model: MemoryModelForCausalLM, window: int, batch: int
) -> Iterator[tuple[Callable[[Tensor, Tensor | None], Tensor], int]]:
    """Make the backbone alone see a sliding window and the first tokens (StreamingLLM).

    Args:
        model: whose backbone reads, without its adapters and memories.
        window: tokens that are seen, sinks among them.
        batch: rows.

    Yields:
        A function from ids and mask `(batch, T)`, fed one after another, to logits
        `(batch, T, V)`; and how many tokens are best fed at once.

    Raises:
        ValueError: where the backbone's attention cannot meet a memory.
    """
    config = WindowConfig(
        segment_size=max(1, window // 4), window_size=max(1, window - SINKS), num_sinks=SINKS
    )
    with lora_disabled(model.backbone), model.parts.attention_lent():
        memory = WindowMemory(config, sizes_of(model.parts, attention=True)).to(model.device)
        reader = SegmentReader(model.parts, {config.name: memory})
        loop = Loop(reader, config)
        state = MemoryState(reader.init_states(batch, model.device), batch)

        def feed(ids: Tensor, mask: Tensor | None = None) -> Tensor:
            nonlocal state
            reading = loop(check_inputs(ids, None, mask), state, hidden_from=0)
            state = reading.state
            return model.parts.head(reading.hidden)  # type: ignore[arg-type]

        yield feed, config.segment_size


__all__ = [
    "CURVES", "FULL", "MEMORY", "OFF", "SHUFFLED", "SINKS", "TRUNCATED", "WINDOW",
    "lora_disabled", "own_context", "windowed",
]  # fmt: skip
