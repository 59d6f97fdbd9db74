"""What a memory begins training with: the embeddings of a text, and what it will be given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memwrap.engine.step import SegmentReader
from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import LayerMemory, SoftPrompt
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.tasks import Sample, task
from memwrap.tasks.base import FIRST_SEED

_LENGTH = 3
"""Segments of a text that segments with and without a fact are taken from."""


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text that memory tokens begin as."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def with_text(config: MemoryConfig, ids: list[int]) -> MemoryConfig:
    """Return a memory's config with as many memory tokens as a text has.

    Raises:
        ValueError: for a memory without memory tokens.
    """
    values = config.to_dict()
    if "num_memory_tokens" not in values:
        raise ValueError(f"{config.name!r} has no memory tokens; leave `start.text` out.")
    return type(config).from_dict({**values, "num_memory_tokens": len(ids)})


@torch.no_grad()
def start_tokens(model: MemoryModelForCausalLM, ids: list[int]) -> None:
    """Let memory tokens begin as the embeddings of a text.

    Raises:
        ValueError: for a memory that has none.
    """
    embeds = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    for memory in model.memories.values():
        if isinstance(memory, SoftPrompt):
            memory.start_tokens(embeds)


@torch.no_grad()
def start_layers(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    count: int,
    seed: int = 0,
) -> int:
    """Let memories at layers begin from what these give for segments with and without a fact.

    Args:
        model: with an empty memory, as wrapped.
        tokenizer: of its backbone.
        names: tasks that the segments are taken from.
        count: segments of each kind.
        seed: of the samples.

    Returns:
        Segments that were read, with those of both kinds.
    """
    layered = {n: m for n, m in model.memories.items() if isinstance(m, LayerMemory)}
    if not layered or not count:
        return 0
    ids, worth = segments(tokenizer, names, model.segment_size, count, seed)
    suffixes = SegmentReader(model.parts, model.memories).layout.suffixes
    seen: dict[int, Tensor] = {}

    def note(layer: int) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        module.register_forward_hook(note(index)) for index, module in enumerate(model.parts.layers)
    ]
    try:
        model.eval().read(ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    for name, memory in layered.items():
        for layer, hidden in seen.items():
            if str(layer) in memory.init_state(1, model.device).get("layers", {}):
                layer_hidden = hidden[:, suffixes[name]]
                memory.start_layer(layer, layer_hidden, worth.to(layer_hidden.device))
    return len(ids)


def segments(
    tokenizer: PreTrainedTokenizerBase, names: list[str], size: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cut samples of tasks into segments.

    Returns:
        Ids `(2 * count, size)`, and `(2 * count,)` bool, which of them hold a whole fact.

    Raises:
        ValueError: where no fact lies inside one segment.
    """
    pieces: dict[bool, list[list[int]]] = {True: [], False: []}
    for index in range(8 * count):
        sample = task(names[index % len(names)]).sample(
            tokenizer, max(_LENGTH * size, 64), FIRST_SEED + seed + index
        )
        for first in range(0, min(sample.ask, len(sample.ids)) - size + 1, size):
            pieces[_holds(sample, first, first + size)].append(sample.ids[first : first + size])
        if min(map(len, pieces.values())) >= count:
            rows = pieces[True][:count] + pieces[False][:count]
            return torch.tensor(rows), torch.arange(2 * count) < count
    raise ValueError(
        f"The tasks {', '.join(names)} have too few facts inside segments of {size} tokens to "
        "start the memory from; set start.segments=0, or another memory.segment_size."
    )


def _holds(sample: Sample, first: int, end: int) -> bool:
    return any(first <= a and b <= end for spans in sample.facts for a, b in spans)


__all__ = ["segments", "start_layers", "start_tokens", "text_ids", "with_text"]
