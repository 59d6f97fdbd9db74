"""Whether a state that comes from a file is one of a model's."""

from __future__ import annotations

from typing import Any

import torch

from memwrap.engine.inputs import check_inputs
from memwrap.memories.protocol import SoftPrompt
from memwrap.state.check import check_open, check_ranges, check_shapes
from memwrap.state.memory_state import MemoryState
from memwrap.state.progress import Progress


def progress_of(model: Any, state: MemoryState) -> Progress:
    """Tell how much the rows of a state have read with a model's memories."""
    prompts = [m for m in model.memories.values() if isinstance(m, SoftPrompt)]
    return Progress.of(
        state,
        prefix=sum(m.num_prefix for m in prompts),
        suffix=sum(m.num_suffix for m in prompts),
        by_columns=any(m.config.count_padding for m in model.memories.values()),
    )


@torch.no_grad()
def check_file_state(model: Any, state: MemoryState) -> None:
    """Refuse a state whose tensors, counters or weights are not those of the model.

    Raises:
        ValueError: says what differs.
    """
    growing = {n: m.widens for n, m in model.memories.items() if m.claims.lengthens}
    fresh = model.new_state(1)
    sizes = next(iter(model.memories.values())).sizes.attention
    windows = {str(layer): dims.window for layer, dims in sizes.items()}
    check_shapes(state, fresh, growing, windows)
    progress = progress_of(model, state)
    for name, memory in model.memories.items():
        tree = state.memories[name]
        check_ranges(name, tree, memory.ranges(tree, progress))
    fresh.hold_open = True
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    opened = model.loop()(check_inputs(token, None, None), fresh).state
    vocabulary = model.parts.embedding_weight.shape[0]
    check_open(state, opened, model.segment_size, vocabulary)
    weights = model.fingerprint()
    differing = [k for k, v in (state.weights or {}).items() if weights.get(k) != v]
    if differing:
        raise ValueError(
            f"The state was written with other weights ({' and '.join(differing)}); load it into "
            "the model that read it, or read the text again."
        )
