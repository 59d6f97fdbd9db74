"""What lies in the host's memory on its way to a device, started before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

Fetch = Callable[[], tuple[Tensor, ...]]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A fresh tensor on a device; to a GPU by way of pinned memory, from where it moves while both
    sides go on (what belongs to a graph goes without: pinning has no gradient)."""
    if device.type == "cuda" and not tensor.is_cuda and not tensor.requires_grad:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def ahead(fetches: Iterable[Fetch], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The results of some fetches in their order, each started before the one in front of it is
    given out. On a GPU they run on a stream of their own: what comes next moves over while the
    device works on what is here. Elsewhere all is the same but for the stream.

    Not for tensors that belong to a graph. The inputs of all fetches must be there at the first.
    """
    stream = _stream(device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))
    before: tuple[tuple[Tensor, ...], Any] | None = None
    for fetch in fetches:
        now = _started(fetch, stream)
        if before is not None:
            yield _arrived(*before, device)
        before = now
    if before is not None:
        yield _arrived(*before, device)


@cache
def _stream(device: torch.device) -> Any:
    """One stream a device, so that what fetches write for later ones is in order."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _started(fetch: Fetch, stream: Any) -> tuple[tuple[Tensor, ...], Any]:
    if stream is None:
        return fetch(), None
    with torch.cuda.stream(stream):
        return fetch(), stream.record_event()


def _arrived(found: tuple[Tensor, ...], event: Any, device: torch.device) -> tuple[Tensor, ...]:
    """The result, once the device's own stream may read it."""
    if event is not None:
        here = torch.cuda.current_stream(device)
        here.wait_event(event)
        for tensor in found:
            tensor.record_stream(here)  # its memory is not given away before `here` is done
    return found


def used_blocks(ids: Tensor, valid: Tensor, landmarks: Tensor, *far: Tensor) -> tuple[Tensor, ...]:
    """A small store that holds the blocks that some queries of one KV head chose.

    Args:
        ids: `(B, G, T, R)` the blocks; N for none.
        valid, landmarks: `(B, N, m)` and `(B, N, D)`, on the device of `ids`.
        far: `(B, N, ...)`, on any device; what is needed of them comes over once.

    Returns:
        `ids`, `valid`, `landmarks` and `far` with n blocks instead of N, as many as the row needs
        that needs most.
    """
    batch, size = landmarks.shape[:2]
    used = torch.zeros(batch, size + 1, dtype=torch.bool, device=ids.device)
    used = used.scatter(1, ids.flatten(1), True)[:, :size]
    count = max(1, int(used.sum(1).max()))
    rank = torch.nn.functional.pad(used.long().cumsum(1) - 1, (0, 1), value=count)
    new = rank[:, None, None].expand(*ids.shape[:3], -1).gather(-1, ids)
    rows = (~used).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    take = partial(_taken, rows)
    return new, take(valid), take(landmarks), *[moved(take(x), ids.device) for x in far]


def _taken(rows: Tensor, x: Tensor) -> Tensor:
    return x[torch.arange(len(rows), device=x.device)[:, None], rows.to(x.device)]


__all__ = ["ahead", "moved", "used_blocks"]
