"""The engine of the server: prompts are read where no state has read them, answers written
together."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from memwrap.backbones.cache_names import CACHE
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.serving.answers import Answer, Sampler, TextPieces
from memwrap.serving.prefixes import PrefixTree
from memwrap.state.memory_state import MemoryState

_NOT_RUNNING = "The server was stopped; start it again (`with Engine(...)`) and ask anew."
_KEPT = 8  # states on the way through a prompt, for others that begin alike


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients may ask for.

    Attributes:
        prompt_tokens: of one request, behind its state.
        new_tokens: of one answer.
        body_bytes: of one request.
        seconds: from a request's arrival to the end of its answer.
        waiting: requests that wait or run; more are refused.
        batch: answers that are written together.
        state_bytes: of states in memory, once for the named ones and once for the prefix tree.
    """

    prompt_tokens: int = 1_000_000
    new_tokens: int = 4_096
    body_bytes: int = 64 * 2**20
    seconds: float = 600.0
    waiting: int = 256
    batch: int = 8
    state_bytes: int = 4 * 2**30


class Busy(Exception):
    """Too many requests wait."""


class Stopped(Exception):
    """The engine does not run, or no longer."""


class Engine:
    """One thread that reads prompts piece by piece and, between the pieces, writes all answers
    that are under way in one batch.

    Examples:
        >>> import memwrap
        >>> from transformers import AutoTokenizer
        >>> from memwrap.assets import asset
        >>> from memwrap.serving.answers import Answer, Sampling
        >>> tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
        >>> with Engine(memwrap.load("armt-lm"), tokenizer) as engine:
        ...     answer = engine.submit(Answer([5, 6, 7], Sampling(max_tokens=2)))
        ...     text = answer.wait()
        >>> len(answer.drawn), answer.reason
        (2, 'length')

    Args:
        model: a memwrap model, in evaluation mode.
        tokenizer: the model's.
        limits: bounds.
    """

    def __init__(
        self, model: MemoryModelForCausalLM, tokenizer: Any, limits: Limits | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.limits = limits or Limits()
        self.prefixes = PrefixTree(model.segment_size, self.limits.state_bytes)
        self._arrived: queue.Queue[Answer | None] = queue.Queue()
        self._reading: list[Answer] = []
        self._writing: list[Answer] = []
        self._batch: MemoryState | None = None
        self._thread: threading.Thread | None = None
        self._ready: list[Answer] = []
        self._count, self._counting = 0, threading.Lock()
        self._running = False

    def __enter__(self) -> Engine:
        self._running, self._arrived = True, queue.Queue()
        self._thread = threading.Thread(target=self._run, name="memwrap-engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._counting:
            self._running = False
            self._arrived.put(None)  # behind all that were taken
        if self._thread is not None:
            self._thread.join()

    def submit(self, answer: Answer) -> Answer:
        """Queue an answer to be written.

        Raises:
            Busy: if too many wait.
            Stopped: if the engine does not run (outside its `with` block).
            ValueError: for an empty prompt, or one that is longer than the limit.
        """
        if not answer.ids:
            raise ValueError("The prompt is empty; give some text.")
        if len(answer.ids) > self.limits.prompt_tokens:
            raise ValueError(
                f"The prompt has {len(answer.ids)} tokens, at most {self.limits.prompt_tokens} are "
                "taken here."
            )
        answer.deadline = time.monotonic() + self.limits.seconds
        with self._counting:
            if not self._running:
                raise Stopped(_NOT_RUNNING)
            if self._count >= self.limits.waiting:
                raise Busy(f"{self._count} requests wait already; try again later.")
            self._count += 1
            self._arrived.put(answer)
        return answer

    # The thread

    @torch.no_grad()
    def _run(self) -> None:
        failure: Exception = Stopped(_NOT_RUNNING)
        try:
            while self._admit(wait=not (self._reading or self._writing or self._ready)):
                self._drop_ended()
                for step in (self._read_some, self._join, self._write_one):
                    step()
        except Exception as error:  # nobody must wait for a thread that is gone
            failure = error
        with self._counting:
            self._running = False
            left = [*self._reading, *self._ready, *self._writing, *self._not_admitted()]
        self._reading, self._ready, self._writing, self._batch = [], [], [], None
        for answer in left:
            self._end(answer, failure)

    def _not_admitted(self) -> Iterator[Answer]:
        while not self._arrived.empty():
            if (answer := self._arrived.get()) is not None:
                yield answer

    def _admit(self, wait: bool) -> bool:
        """Take what has arrived; False: the engine stops."""
        while True:
            try:
                answer = self._arrived.get(block=wait)
            except queue.Empty:
                return True
            if answer is None:
                return False
            wait = False
            try:
                answer.sampler = Sampler(answer.sampling, self.model.device)
            except Exception as error:  # settings that no draw takes
                self._end(answer, error)
                continue
            self._reading.append(answer)
            answer.text = TextPieces(self.tokenizer, answer.sampling.stop)
            state, answer.read = self.prefixes.longest(answer.ids, answer.behind)
            answer.state, answer.cached = state or answer.base, answer.read

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for waiting in (self._reading, self._ready):
            for answer in [a for a in waiting if a.cancelled or now > a.deadline]:
                waiting.remove(answer)
                self._end(answer, None if answer.cancelled else TimeoutError("Out of time."))
        for answer in self._writing:
            if answer.cancelled:
                answer.reason = "cancelled"
        self._leave()

    def _read_some(self) -> None:
        """Read the next piece of the prompt that waits longest; its last token is for `_join`."""
        if not self._reading:
            return
        answer = self._reading[0]
        size, last = self.model.segment_size, len(answer.ids) - 1
        try:
            if answer.read < last:
                step = size * max(1, math.ceil(last / size / _KEPT))
                stop = min(answer.read - answer.read % size + step, last)
                if stop == last and last - answer.read > size:  # the last boundary is kept, too
                    stop = last - last % size or last
                piece = torch.tensor([answer.ids[answer.read : stop]], device=self.model.device)
                answer.state = self.model.read(piece, state=answer.state)
                answer.read = stop
                self.prefixes.put(answer.ids[:stop], answer.state, answer.behind)
        except Exception as error:  # the client is told; others go on
            self._reading.pop(0)
            self._end(answer, error)
            return
        if answer.read >= last:
            self._ready.append(self._reading.pop(0))

    def _join(self) -> None:
        """Let answers whose prompts were read join the batch."""
        while self._ready and len(self._writing) < self.limits.batch:
            answer = self._ready.pop(0)
            state = answer.state if answer.state is not None else self.model.new_state(1)
            self._batch = state if self._batch is None else MemoryState.cat([self._batch, state])
            self._writing.append(answer)

    def _write_one(self) -> None:
        """Draw the next token of every answer in the batch."""
        if self._batch is None:
            return
        ids = [a.drawn[-1] if a.drawn else a.ids[-1] for a in self._writing]
        given = torch.tensor(ids, device=self.model.device)[:, None]
        try:
            batch = self._batch.clone()
            logits = self.model(given, **{CACHE: batch}, logits_to_keep=1).logits[:, -1]
        except Exception as error:
            for answer in self._writing:
                self._end(answer, error)
            self._writing, self._batch = [], None
            return
        self._batch = batch
        for answer, row in zip(self._writing, logits, strict=True):
            try:
                answer.take(answer.sampler(row))
            except Exception as error:  # of one answer alone: others go on
                answer.error, answer.reason = error, "error"
        self._leave()

    def _leave(self) -> None:
        """Let answers that ended leave the batch; what they have read is kept."""
        ended = [i for i, a in enumerate(self._writing) if a.reason is not None]
        if not ended or self._batch is None:
            return
        for row in ended:
            answer = self._writing[row]
            if answer.drawn and answer.error is None:
                ids = answer.ids + answer.drawn[:-1]
                state = self._batch.select(torch.tensor([row]))
                state.columns = len(ids) + (answer.base.columns if answer.base is not None else 0)
                self.prefixes.put(ids, state, answer.behind)
            self._end(answer, answer.error)
        kept = [i for i in range(len(self._writing)) if i not in ended]
        self._batch = self._batch.select(torch.tensor(kept)) if kept else None
        self._writing = [self._writing[i] for i in kept]

    def _end(self, answer: Answer, error: Exception | None = None) -> None:
        with self._counting:
            self._count -= 1
        answer.finish(error)


__all__ = ["Busy", "Engine", "Limits", "Stopped"]
