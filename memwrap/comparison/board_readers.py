"""Reading a text and being asked about it: by a memory, or by the base with what fits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import memwrap
from memwrap.backbones.cache_names import CACHE
from memwrap.comparison.board_texts import Asked

PIECE = 128
"""Tokens at once, in whole segments."""
DECODED = 8
Feed = Callable[[Tensor, int], Tensor]
"""New ids `(1, T)` and how many logits are wanted -> logits `(n, V)`."""


@dataclass
class TextRead:
    """A text as a reader has it.

    Attributes:
        after: opens a copy of what was kept, to be fed further.
        bytes: the most that was kept at the end of a segment.
        nats: of every token after the first, each given what the reader knew there.
        seconds: of the processor, for reading.
    """

    after: Callable[[], AbstractContextManager[Feed]]
    bytes: int
    nats: list[float] = field(default_factory=list)
    seconds: float = 0.0


def _losses(logits: Tensor, targets: list[int]) -> list[float]:
    wanted = torch.tensor(targets, dtype=torch.long, device=logits.device)
    count = len(targets)
    return F.cross_entropy(logits[:count].float(), wanted, reduction="none").tolist()


@torch.no_grad()
def read_with_memory(model: Any, ids: list[int], device: torch.device | None = None) -> TextRead:
    """Read a text with a memory model, a piece at a time."""
    size = model.segment_size
    piece = max(1, PIECE // size) * size
    state, kept = model.new_state(1), 0
    row = torch.tensor([ids], device=device or model.device)
    nats: list[float] = []
    seconds = 0.0
    for first in range(0, len(ids), piece):
        start = time.process_time()
        logits = model(row[:, first : first + piece], cache=state).logits[0]
        seconds += time.process_time() - start
        nats += _losses(logits, ids[first + 1 : first + piece + 1])
        if first + piece <= len(ids) or not kept:
            kept = max(kept, state.nbytes)

    @contextmanager
    def after() -> Iterator[Feed]:
        copied = state.clone()
        yield lambda new, keep: model(new, cache=copied, logits_to_keep=keep).logits[0]

    return TextRead(after, kept, nats, seconds)


@torch.no_grad()
def read_with_base(base: Any, ids: list[int], window: int, token_bytes: float) -> TextRead:
    """Read a text with the base alone, in windows that are read without what came before them;
    what is kept for questions is the last `window` tokens (0: nothing is read).

    Args:
        base: the model.
        ids: of the text.
        window: tokens.
        token_bytes: what a token takes in its cache.
    """
    nats: list[float] = []
    seconds, cache = 0.0, None
    for first in range(0, len(ids) if window else 0, max(window, 1)):
        start = time.process_time()
        cache, logits = _cached(base, ids[first : first + window])
        seconds += time.process_time() - start
        nats += _losses(logits, ids[first + 1 : first + window + 1])
    kept = ids[-window:] if window else ids[:1]
    if len(kept) < len(ids):
        cache, _ = _cached(base, kept)

    @contextmanager
    def after() -> Iterator[Feed]:
        copied = copy.deepcopy(cache)
        yield lambda new, keep: base(new, **{CACHE: copied}, logits_to_keep=keep).logits[0]

    return TextRead(after, round(token_bytes * len(kept)), nats, seconds)


def _cached(base: Any, ids: list[int]) -> tuple[Any, Tensor]:
    """Run the base over a text; gives its cache and its logits `(T, V)`."""
    out = base(torch.tensor([ids], device=base.device), use_cache=True)
    return out[CACHE], out.logits[0]


@torch.no_grad()
def knows(read: TextRead, asked: Asked, device: torch.device) -> bool:
    """Tell whether each token of the answer is the most likely one."""
    with read.after() as feed:
        logits = feed(torch.tensor([asked.ids], device=device), asked.count + 1)
    return logits[-asked.count - 1 : -1].argmax(-1).tolist() == asked.ids[-asked.count :]


@torch.no_grad()
def decoding_seconds(read: TextRead, asked: Asked, device: torch.device) -> float:
    """Measure the processor's seconds of a decoded token behind a text and a question."""
    with read.after() as feed:
        logits = feed(torch.tensor([asked.ids[: -asked.count]], device=device), 1)
        start = time.process_time()
        for _ in range(DECODED):
            logits = feed(logits[-1:].argmax(-1)[None], 1)
        return (time.process_time() - start) / DECODED


def bytes_of_token(base: Any, ids: list[int]) -> float:
    """Measure what a token takes in the base's own cache, by keeping all of 32 and of 64."""
    model = memwrap.wrap(base, "window", segment_size=4096).eval()
    sizes = [model.read(torch.tensor([ids[:n]], device=base.device)).nbytes for n in (32, 64)]
    memwrap.unwrap(model)
    return (sizes[1] - sizes[0]) / 32


__all__ = [
    "TextRead", "bytes_of_token", "decoding_seconds", "knows", "read_with_base", "read_with_memory",
]  # fmt: skip
