"""Invariant 12: two calls on one model at once, each with its own state, give what they give alone.

At every module that one call enters another runs from beginning to end, in a thread of its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.testing.helpers import (
    SEGMENT,
    assert_same_gradients,
    assert_same_states,
    checkpointed,
    error_of,
    ids,
    padded,
    pairs,
    wrapped,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
EXACT = 1e-6  # the same operations in the same order: nothing but the threads differs


class Request:
    """A text that continues a state of its own, with what it gives alone."""

    def __init__(self, model: Any, seed: int, rows: int) -> None:
        self.model = model
        self.state = model.read(ids(rows, 2 * SEGMENT + 3 + seed, seed=seed))
        texts = [ids(SEGMENT + 2 - row, seed=10 + seed + row) for row in range(rows)]
        self.text, self.mask = padded(texts, "left")
        self.logits, self.after = self.run()

    @torch.no_grad()
    def run(self) -> tuple[Tensor, Any]:
        state = self.state.clone()
        out = self.model(self.text, attention_mask=self.mask, cache=state)
        return out.logits, out.cache

    def check(self) -> None:
        logits, after = self.run()
        assert error_of(logits, self.logits) <= EXACT
        assert_same_states(after, self.after, EXACT)


@contextmanager
def meanwhile(model: Any, other: Callable[[], Any], every: int = 1) -> Iterator[list[int]]:
    """Run `other` whole in another thread at every module without children (or every so many)
    that this thread enters inside the block. Gives the number of times in a list."""
    thread, entered, times = threading.get_ident(), [0], [0]
    with ThreadPoolExecutor(1) as pool:

        def enter(*_: Any) -> None:
            if threading.get_ident() == thread:
                entered[0] += 1
                if entered[0] % often == 0:
                    times[0] += 1
                    pool.submit(other).result()

        leaves = [m for m in model.modules() if not list(m.children())]
        often = every * (1 + len(leaves) // 40)  # a model of many experts takes long
        handles = [m.register_forward_pre_hook(enter) for m in leaves]
        try:
            yield times
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def eager_switching() -> Iterator[None]:
    """Let threads take turns as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def check_interleaved(model: Any) -> None:
    first, second = Request(model, 0, 1), Request(model, 3, 2)
    assert error_of(first.logits[:, :2], second.logits[:1, :2]) > 1e-2
    for one, other in ((first, second), (second, first)):
        with meanwhile(model, other.check) as times:
            one.check()
        assert times[0] > 10


@pytest.mark.long
@pairs()
def test_a_call_runs_through_at_every_module_of_another(memory: str, family: str) -> None:
    check_interleaved(wrapped(memory, family))


@pytest.mark.long
@pairs()
def test_many_requests_in_a_pool_of_threads(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    requests = [Request(model, seed, 1 + seed % 2) for seed in range(4)]
    with eager_switching(), ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(r.check) for _ in range(3) for r in requests]:
            future.result()


@pytest.mark.long
@pairs()
def test_generating_in_threads(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    texts = [ids(1, SEGMENT - 2 + 5 * n, seed=n) for n in range(3)]
    states = [model.read(ids(1, 20 + n, seed=n)) for n in range(3)]

    def answers(n: int) -> list[list[int]]:
        asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        greedy = model.generate(texts[n], **asked)
        beams = model.generate(texts[n], cache=states[n], num_beams=2, **asked)
        return [greedy[0].tolist(), beams[0].tolist()]

    wanted = [answers(n) for n in range(3)]
    assert len({tuple(a[0][-5:]) for a in wanted}) > 1
    with eager_switching(), ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(answers, n) for _ in range(2) for n in range(3)]
        assert [future.result() for future in futures] == wanted * 2


def gradients_of(model: Any, text: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss, without `.grad`, which all trainings of a model share."""
    loss = model(text, labels=text).loss
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


@pytest.mark.long
@pytest.mark.parametrize("recomputing", [pytest.param(False, marks=pytest.mark.slow), True])
@pairs()
def test_training_beside_reading_and_training(memory: str, family: str, recomputing: bool) -> None:
    """With recomputation the backward pass runs the modules again, and is interrupted too."""
    model = wrapped(memory, family)
    if recomputing:
        checkpointed(model)
    model.train()
    text, other_text = ids(2, 2 * SEGMENT + 3, seed=1), ids(1, SEGMENT + 4, seed=2)
    wanted, other_wanted = gradients_of(model, text), gradients_of(model, other_text)
    reading = Request(model, 3, 1)

    def train() -> None:
        assert_same_gradients(gradients_of(model, other_text), other_wanted, EXACT)

    for other, every in ((reading.check, 9), (train, 13)):
        with meanwhile(model, other, every) as times:
            assert_same_gradients(gradients_of(model, text), wanted, EXACT)
        assert times[0] > 3
