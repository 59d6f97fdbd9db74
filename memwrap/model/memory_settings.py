"""What is asked of a model's memories between calls: other settings, and how much they have
summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts import sums
from memwrap.state.memory_state import MemoryState


class MemorySettingsMixin:
    """The part of a model that changes settings of its memories and looks into their states."""

    @torch.no_grad()
    def state_norms(self: Any, state: MemoryState) -> dict[str, dict[int, Tensor]]:
        """Compute how large the sums are that memories keep over segments, by memory and layer.

        Examples:
            >>> import memwrap
            >>> model = memwrap.load("armt-lm")
            >>> norms = model.state_norms(model.read([list(range(300))]))
            >>> list(norms["armt"]), norms["armt"][0].shape
            ([0, 1, 2, 3, 4, 5], torch.Size([1]))

        Args:
            state: of this model.

        Returns:
            `(B,)`: the norm of a head's sums together, of the head where it is largest. What sums
            nothing is left out.
        """
        norms = {n: sums.state_norms(m, state.memories[n]) for n, m in self.memories.items()}
        return {name: layers for name, layers in norms.items() if layers}

    def memory_settings(self: Any, name: str, **settings: Any) -> dict[str, Any]:
        """Change settings of a memory on which no state depends, such as how many entries are
        looked up: what was read before stays valid, so that reading and asking may differ.

        Examples:
            >>> import memwrap
            >>> base = memwrap.load("armt-lm").backbone
            >>> model = memwrap.wrap(base, memwrap.InfLLMConfig(segment_size=64, top_k=4)).eval()
            >>> state = model.read([list(range(300))])
            >>> before = model.memory_settings("infllm", top_k=64)
            >>> before
            {'top_k': 4}
            >>> model.generate(input_ids, state=state)  # doctest: +SKIP
            >>> model.memory_settings("infllm", **before)
            {'top_k': 64}

        Args:
            name: the memory's.
            settings: fields of its config.

        Returns:
            The values that these fields had.

        Raises:
            ValueError: for a memory that the model does not have, an unknown field, one on which
                states depend, or a value that does not fit.
        """
        memories = self.memories
        if name not in memories:
            raise ValueError(f"There is no memory {name!r} here; there are {', '.join(memories)}.")
        memory = memories[name]
        config: MemoryConfig = memory.config
        new = config.from_dict({**config.to_dict(), **settings})
        free = config.free_fields()
        for field in settings:
            if field not in free:
                raise ValueError(
                    f"States depend on {type(config).__name__}.{field}; wrap with another value "
                    f"and read again. What may change: {', '.join(sorted(free))}."
                )
        before = {field: getattr(config, field) for field in settings}
        for held in _held(self, name):
            for field in settings:
                object.__setattr__(held, field, getattr(new, field))
        self.config.memories = [c.to_dict() for c in self.memory_configs]
        for module in {id(m): m for m in (memory, *_memories(self, name))}.values():
            module.resettled(set(settings))
        return before


def _memories(model: Any, name: str) -> list[Any]:
    """List the memory and the copies that PEFT made of it."""
    return [
        module
        for module in model.memory_modules.modules()
        if hasattr(module, "resettled") and module.config.name == name
    ]


def _held(model: Any, name: str) -> list[MemoryConfig]:
    """List every object that holds the memory's settings."""
    configs = [c for c in model.memory_configs if c.name == name]
    for module in model.memory_modules.modules():
        config = getattr(module, "config", None)
        if isinstance(config, MemoryConfig) and config.name == name:
            configs.append(config)
    return list({id(config): config for config in configs}.values())


__all__ = ["MemorySettingsMixin"]
