"""What lies in the host's memory on its way to a device, started before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Fetched = TypeVar("Fetched")


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; to a GPU by way of pinned memory, from where it moves while both
    sides go on (what belongs to a graph goes without: pinning has no gradient)."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.requires_grad:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def prefetch(fetches: Iterable[Callable[[], Fetched]], device: torch.device) -> Iterator[Fetched]:
    """Yield the results of some fetches in their order, each started before the one in front of it
    is given out. On a GPU they run on a stream of their own: what comes next moves over while the
    device works on what is here. Elsewhere all is the same but for the stream.

    Not for tensors that belong to a graph. The inputs of all fetches must be there at the first.
    For a GPU they give tuples of tensors.
    """
    stream = _stream(device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    before: tuple[Fetched, Any] | None = None
    for fetch in fetches:
        now = _started(fetch, stream)
        if before is not None:
            yield _arrived(*before, device)
        before = now
    if before is not None:
        yield _arrived(*before, device)


@cache
def _stream(device: torch.device) -> Any:
    """Give one stream a device, so that what fetches write for later ones is in order."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _started(fetch: Callable[[], Fetched], stream: Any) -> tuple[Fetched, Any]:
    if stream is None:
        return fetch(), None
    with torch.cuda.stream(stream):
        return fetch(), stream.record_event()


def _arrived(fetched: Fetched, event: Any, device: torch.device) -> Fetched:
    """Give the result, once the device's own stream may read it."""
    if event is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        tensors: Any = fetched
        for tensor in tensors:
            tensor.record_stream(stream)  # its memory is not given away before `stream` is done
    return fetched
