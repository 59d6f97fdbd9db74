"""One answer that is being written: what is asked, what was drawn, and the text of it."""

from __future__ import annotations

import queue
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from memwrap.state.memory_state import MemoryState


@dataclass(frozen=True)
class Sampling:
    """The settings of an answer's draws, and of its end.

    Attributes:
        max_tokens: at most so many.
        temperature: 0 takes the most likely one.
        top_p, top_k: draw among the most likely ones only; 1 and 0 for all.
        seed: of the draws.
        stop: texts that end the answer; they are not part of it.
        ends: ids that end it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()


class Sampler:
    """The draws of one answer, from a generator of its own.

    Args:
        sampling: how.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0
        self.warpers: list[Any] = []
        if self.greedy:
            return
        self.generator = torch.Generator(device)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
        self.generator.manual_seed(seed)
        if sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor) -> int:
        """Draw a token from its logits `(V,)`."""
        if self.greedy:
            return int(logits.argmax())
        scores = logits[None].float()
        for warper in self.warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.generator))


class TextPieces:
    """Text of ids that come one by one, in pieces that no later id changes.

    Args:
        tokenizer: decodes them.
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self._ids: list[int] = []
        self._given, self._seen = 0, 0  # ids whose text was given; those before them give context
        self._held = ""  # may be the beginning of a stop
        self.stopped = False

    def push(self, token: int, last: bool = False) -> str:
        """Take a token; give the text that is certain now, all of it if it is the `last`."""
        self._ids.append(token)
        before = self._decode(self._seen, self._given)
        now = self._decode(self._seen, len(self._ids))
        if now.endswith("\ufffd") and not last:  # a character of several tokens
            return ""
        self._seen, self._given = self._given, len(self._ids)
        return self._certain(now[len(before) :], last)

    def end(self) -> str:
        """Give what was held back."""
        text, self._held = self._held, ""
        return text

    def _certain(self, new: str, last: bool) -> str:
        text = self._held + new
        places = [i for i in (text.find(s) for s in self.stop) if i >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0
        if not last:
            sizes = (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n]))
            keep = max(sizes, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@dataclass
class Answer:
    """An answer that the engine writes.

    Attributes:
        ids: the prompt's, those behind `base`.
        sampling: how tokens are drawn.
        base: the state that the prompt continues, or None.
        behind: names the base for the prefix tree.
        deadline: when it ends at the latest, of `time.monotonic`.
        cached: ids of the prompt that had been read before.
        drawn: ids so far.
        reason: why it ended: "stop", "length" or "cancelled".
        cancelled: whether nobody waits for it any more.
        state: what has been read of it, `read` ids; given away once it is written with others.
        pieces: its text as it grows, None at the end.
        text, sampler: its `TextPieces` and `Sampler`.
    """

    ids: list[int]
    sampling: Sampling
    base: MemoryState | None = None
    behind: str = ""
    deadline: float = float("inf")
    cached: int = 0
    drawn: list[int] = field(default_factory=list)
    reason: str | None = None
    cancelled: bool = False
    error: Exception | None = None
    state: MemoryState | None = None
    read: int = 0
    pieces: queue.Queue[str | None] = field(default_factory=queue.Queue)
    text: Any = None
    sampler: Any = None

    def take(self, token: int) -> None:
        """Take a drawn token and give its text on; sets `reason` where the answer ends."""
        self.drawn.append(token)
        if token in self.sampling.ends:
            self.reason = "stop"
            self.pieces.put(self.text.end())
            return
        full = len(self.drawn) >= self.sampling.max_tokens
        last = full or time.monotonic() > self.deadline
        piece = self.text.push(token, last)
        if self.text.stopped:
            self.reason = "stop"
        elif last:
            self.reason = "length"
        self.pieces.put(piece)

    def finish(self, error: Exception | None = None) -> None:
        """End it: nobody waits for more."""
        self.error, self.state = error, None
        self.pieces.put(None)

    def wait(self) -> str:
        """Wait for the whole text.

        Raises:
            Exception: what the engine met.
        """
        parts = []
        while (piece := self.pieces.get()) is not None:
            parts.append(piece)
        if self.error is not None:
            raise self.error
        return "".join(parts)


__all__ = ["Answer", "Sampler", "Sampling", "TextPieces"]
