"""What a call of a memory model gives, and the two names by which a state is given to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from memwrap.backbones.cache_names import CACHE
from memwrap.state.memory_state import MemoryState


@dataclass
class MemoryModelOutput(CausalLMOutputWithPast):
    """The output of a call: `loss`, `logits` and the state as `cache`, whatever the installed
    transformers calls it."""

    if CACHE != "cache":

        @property  # type: ignore[misc]
        def cache(self) -> MemoryState | None:  # type: ignore[override]
            return getattr(self, CACHE)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the state that a caller gave by either name.

    Raises:
        ValueError: if both were given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` name the same state; give one of them.")
    return past_key_values if cache is None else cache
