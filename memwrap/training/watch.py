"""Notice a training that makes the model worse than it was, and how large states become in it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

FIRST, LAST = 3, 5
"""Steps that say how the model began, and steps whose mean is held against them."""


class LossWatch:
    """The losses of the first steps, and of the last.

    A run is said to go wrong where the mean of the last steps is above that of the first ones by
    half a nat and an eighth; it is said to be lost at twice the first and one nat.

    Attributes:
        wrong: the step in which it was noticed first; None so far.
        lost: whether it should stop.
    """

    def __init__(self) -> None:
        self.wrong: int | None = None
        self.lost = False
        self._step = -1
        self._first: float | None = None
        self._last: deque[float] = deque(maxlen=LAST)

    def add(self, loss: float, step: int) -> None:
        """Note the loss of a step; several of one step are added up."""
        if step == self._step and self._last:
            self._last[-1] += loss
            return
        self._judge()
        self._step = step
        self._last.append(loss)

    def _judge(self) -> None:
        """Judge the steps that are complete."""
        if len(self._last) == FIRST and self._first is None:
            self._first = sum(self._last) / FIRST
        if self._first is None or len(self._last) < LAST:
            return
        first, last = self._first, sum(self._last) / LAST
        self.lost = self.lost or last > 2 * first + 1
        if self.wrong is None and last > first + 0.5 + first / 8:
            self.wrong = self._step + 1
            logger.warning(
                f"The loss was {first:.2f} in the first steps and is {last:.2f} at step "
                f"{self.wrong}: the training makes the model worse. Lower learning_rate or "
                "memory_learning_rate, or give warmup_steps."
            )


Norms = dict[str, dict[str, float]]


class NormWatch:
    """The largest norms of what memories sum (`model.state_norms`), of all states since the last
    log.

    Attributes:
        largest: by memory and layer, at the last log that had any.
    """

    def __init__(self) -> None:
        self.largest: Norms = {}
        self._now: dict[tuple[str, str], Tensor] = {}  # left on their devices until a log

    def add(self, model: Any, state: Any) -> None:
        """Note the norms of a state."""
        for name, layers in model.state_norms(state).items():
            for layer, norms in layers.items():
                key = name, str(layer)
                self._now[key] = torch.maximum(norms.max(), self._now.get(key, norms.max()))

    def logged(self) -> dict[str, float]:
        """Begin anew; return what a log says: the largest of each memory."""
        if self._now:
            self.largest = {}
        for (name, layer), norm in self._now.items():
            self.largest.setdefault(name, {})[layer] = float(norm)
        self._now = {}
        return {f"{n}.state_norm": max(layers.values()) for n, layers in self.largest.items()}


def any_sums(model: Any) -> bool:
    """Tell whether a memory sums over segments."""
    return any(memory.sums for memory in model.memories.values())


__all__ = ["LossWatch", "NormWatch", "any_sums"]
