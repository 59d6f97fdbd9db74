"""What a call of a memory model gives, and the two names by which a state is given to one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
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


class LaterLogits(MemoryModelOutput):
    """An output beside a loss whose logits are computed when they are first looked at: in
    evaluation every model of transformers has them, and most texts are evaluated without.

    Libraries that go through an output's tensors (accelerate's autocast, torch's gathering) build
    another of the same class from what it holds: that is a plain one."""

    def __new__(cls, later: Any = None, **fields: Any) -> Any:
        if callable(later):
            return super().__new__(cls)
        return MemoryModelOutput(**dict(later or {}), **fields)

    def __init__(self, later: Callable[[], Tensor], **fields: Any) -> None:
        self.__dict__["_later"] = None
        super().__init__(**fields)
        self.__dict__["_later"] = partial(copy_context().run, later)

    @property
    def logits(self) -> Any:
        """The logits `(B, T, V)`, computed when they are first asked for."""
        later = self.__dict__["_later"]
        if later is not None:
            self.__dict__["_later"] = None
            OrderedDict.__setitem__(self, "logits", later())
            if CACHE in OrderedDict.keys(self):
                self.move_to_end(CACHE)
        return OrderedDict.get(self, "logits")

    @logits.setter
    def logits(self, value: Any) -> None:
        """Take no others."""

    def __iter__(self) -> Iterator[str]:
        _ = self.logits
        return super().__iter__()

    def __len__(self) -> int:
        _ = self.logits
        return super().__len__()

    def __contains__(self, name: object) -> bool:
        return name == "logits" or super().__contains__(name)

    def keys(self) -> Any:
        _ = self.logits
        return super().keys()

    def values(self) -> Any:
        _ = self.logits
        return super().values()

    def items(self) -> Any:
        _ = self.logits
        return super().items()

    def __reduce__(self) -> Any:
        return MemoryModelOutput, (), dict(self.items()), None, iter(self.items())


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the state that a caller gave by either name.

    Raises:
        ValueError: if both were given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("`cache` and `past_key_values` name the same state; give one of them.")
    return past_key_values if cache is None else cache
