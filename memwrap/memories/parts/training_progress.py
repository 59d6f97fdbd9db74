"""How far a training has come, for what a memory does more of towards its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_done: ContextVar[float] = ContextVar("memwrap_training_done", default=1.0)


def training_done() -> float:
    """Give the part of the training, from 0 to 1, that is behind; 1 outside of the trainer."""
    return _done.get()


@contextmanager
def training_at(done: float) -> Iterator[None]:
    """Say inside the block, in this thread, that a part `done` of the training is behind."""
    token = _done.set(done)
    try:
        yield
    finally:
        _done.reset(token)
