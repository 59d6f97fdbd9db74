"""Building a model that a file describes without allocating more than the file holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Beside what is saved there are buffers, weights that are tied, and what initialising takes.
_TIMES, _NUMBERS, _TENSORS, _LARGE = 4, 2**26, 10_000, 2**20


class _Counting(TorchDispatchMode):
    """Count the numbers in tensors that are made from nothing, before they are made."""

    def __init__(self, numbers: int, tensors: int) -> None:
        super().__init__()
        self.numbers, self.tensors = numbers, tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if ".new_" in f".{func.name().partition('::')[2]}" and len(args) > 1:
            self.numbers -= math.prod(args[1])
        elif "constant_pad" in func.name():
            self.numbers -= math.prod(args[0].shape[: args[0].dim() - len(args[1]) // 2]) * sum(
                n for n in args[1] if n > 0
            )
        elif not any(isinstance(arg, Tensor) for arg in args):
            sizes = [arg for arg in args if isinstance(arg, (list, tuple))]
            self.tensors -= 1
            if sizes and all(isinstance(n, int) for n in sizes[0]):
                self.numbers -= math.prod(sizes[0])
            elif args and isinstance(args[-1], (int, float)) and "range" in func.name():
                self.numbers -= int(abs(args[-1]))
        if self.numbers < 0 or self.tensors < 0:
            raise _TooLargeError
        return func(*args, **(kwargs or {}))


def try_large_settings(model: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Read a few tokens with a model whose config at `path` has settings so large that reading
    could allocate much more than the `tensors` beside it.

    Raises:
        ValueError: if it would.
    """
    settings = [v for config in model.memory_configs for v in vars(config).values()]
    if max((v for v in settings if type(v) is int), default=0) <= _LARGE:
        return
    training = model.training
    model.eval()
    ids = torch.zeros(1, min(2 * model.segment_size + 1, 64), dtype=torch.long, device=model.device)
    try:
        with building(tensors, path):
            model.close_segment(model.read(ids))
    finally:
        model.train(training)


class _TooLargeError(Exception):
    """More was asked for than a file holds."""


@contextmanager
def building(tensors: dict[str, Tensor], path: Path) -> Iterator[None]:
    """Build modules that the config at `path` describes, for the `tensors` beside it.

    Raises:
        ValueError: if they would be much larger than the tensors, or cannot be built.
    """
    numbers = _TIMES * sum(t.numel() for t in tensors.values()) + _NUMBERS
    try:
        with _Counting(numbers, 64 * len(tensors) + _TENSORS):
            yield
    except _TooLargeError as error:
        raise ValueError(
            f"{path} describes a model that is much larger than the weights beside it."
        ) from error
    except Exception as error:  # of memwrap, transformers, PEFT or torch, of every kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: {reason}") from error
