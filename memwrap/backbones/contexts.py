"""What a run of the backbone hands to modules deep inside it, without a keyword: many families
hand none down. A nested run has its own, or none; so has every thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_run: ContextVar[Any] = ContextVar("memwrap_run", default=None)


@contextmanager
def reaching(context: Any) -> Iterator[None]:
    """Let layers and attention meet `context` inside the block; None: they run as they are."""
    token = _run.set(context)
    try:
        yield
    finally:
        _run.reset(token)


def reached() -> Any:
    """Give the context of the run that this is a part of, or None."""
    return _run.get()
