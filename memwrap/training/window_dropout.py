"""Rows of training that read a memory's recurrence without the window beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from memwrap.memories.protocol import Memory
from memwrap.training.arguments import MemoryTrainingArguments


def _with_windows(model: Any) -> list[Memory]:
    """List a model's memories that can leave their window out in some rows."""
    return [m for m in model.memories.values() if m.draws_branches and "window" in m.branches]


def check_window_dropout(model: Any, args: MemoryTrainingArguments) -> None:
    """Refuse `window_dropout` where no memory has a window to leave out.

    Raises:
        ValueError: says so.
    """
    if (args.window_dropout or args.window_dropout_end) and not _with_windows(model):
        raise ValueError(
            "`window_dropout` leaves a memory's window out of some rows, and this model has none "
            "beside a recurrence (liger has); set it to 0."
        )


@contextmanager
def windows_dropped(model: Any, args: MemoryTrainingArguments, done: float) -> Iterator[None]:
    """Leave the window out of a share of the rows inside the block, as it is after a part `done`
    of the run."""
    share = args.window_dropout_at(done)
    with ExitStack() as stack:
        for memory in _with_windows(model) if share else ():
            stack.enter_context(memory.only("recurrent", share))
        yield


__all__ = ["check_window_dropout", "windows_dropped"]
