"""The memories of a model, built for its backbone."""

from __future__ import annotations

import warnings

from memwrap.backbones import Backbone
from memwrap.backbones.backbone import memory_dtype
from memwrap.memories.config import MemoryConfig
from memwrap.memories.pairs import check_prefix, check_together
from memwrap.memories.protocol import AttentionMemory, LayerMemory, Memory, SoftPrompt
from memwrap.memories.registry import memory_class
from memwrap.memories.sizes import Sizes


def build_memories(parts: Backbone, configs: list[MemoryConfig]) -> dict[str, Memory]:
    """Build the memories that the configs describe, by name.

    Raises:
        ValueError: if there is none, they do not go together, or the backbone has no room.
    """
    if not configs:
        raise ValueError("No memory was given: wrap(model, 'armt') or a config of one.")
    classes = {config.name: memory_class(config.name) for config in configs}
    check_together(classes)
    if len({config.segment_size for config in configs}) > 1:
        raise ValueError("The memories have different `segment_size`s; give them one.")
    attention = any(issubclass(kind, AttentionMemory) for kind in classes.values())
    layers = attention or any(issubclass(kind, LayerMemory) for kind in classes.values())
    sizes = sizes_of(parts, layers=layers, attention=attention)
    memories = {config.name: classes[config.name](config, sizes) for config in configs}
    check_prefix(memories)
    _check_positions(parts, configs[0], memories)
    return memories


def sizes_of(parts: Backbone, *, layers: bool = True, attention: bool = False) -> Sizes:
    """Collect what memories are told of the backbone.

    Args:
        layers: count the decoder layers themselves, not the config's number.
        attention: look at every layer's attention too (runs one token).
    """
    return Sizes(
        hidden_size=parts.config.hidden_size,
        embedding_size=parts.embedding_size,
        num_layers=len(parts.layers) if layers else parts.config.num_hidden_layers,
        embedding_std=parts.embedding_std(),
        embedding_mean=parts.embedding_mean(),
        vocab_size=parts.embedding_weight.shape[0],
        dtype=memory_dtype(parts.model),
        backbone_dtype=parts.embedding_weight.dtype,
        device=parts.device,
        attention=parts.attention_sizes() if attention else {},
    )


def _check_positions(parts: Backbone, config: MemoryConfig, memories: dict[str, Memory]) -> None:
    """Refuse segments that take more positions than the backbone has."""
    limit = parts.position_limit
    extra = config.longest_segment - config.segment_size
    for memory in memories.values():
        free = isinstance(memory, SoftPrompt) and memory.zero_positions and parts.max_positions
        if isinstance(memory, SoftPrompt) and not free:
            extra += memory.num_prefix + memory.num_suffix
    if limit is not None and config.segment_size + extra > limit.positions:
        most = limit.positions - extra
        advice = f"Use segments of at most {most}." if most > 0 else "Use fewer memory tokens."
        raise ValueError(
            f"`segment_size` {config.segment_size} with {extra} memory tokens needs "
            f"{config.segment_size + extra} positions; {limit.reason}. {advice}"
        )
    for name, memory in memories.items():
        if limit is None or parts.max_positions is not None:
            continue
        if not isinstance(memory, AttentionMemory):
            continue
        if memory.counts_positions or memory.reaches >= limit.positions:
            far = "" if memory.counts_positions else f" (up to {memory.reaches}, by its settings)"
            warnings.warn(
                f"The memory {name!r} counts positions beyond a segment's{far}, and {limit.reason} "
                "(rotary angles): it refuses texts that reach so far.",
                stacklevel=4,
            )
