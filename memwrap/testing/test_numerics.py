"""Invariant 10: no NaN and no Inf, in half precision over a thousand segments of anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.memories.protocol import AttentionMemory
from memwrap.memories.registry import memory_class
from memwrap.state.trees import tree_leaves
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, error_of, gradients, ids, padded, pairs, tiny, wrapped

# A row of random ids, and one of the same id again and again.
ROWS = 2


def text_of(segments: int) -> Tensor:
    """Two rows that have nothing to do with each other, read at the price of one."""
    text = ids(ROWS, segments * SEGMENT)
    text[1] = 7
    return text


def assert_finite(state: Any) -> None:
    for tree in state.memories.values():
        for name, value in tree_leaves(tree):
            assert bool(value.isfinite().all()), name


HALVES = (torch.bfloat16, torch.float16)
# What grows shows long before a thousand segments, which take ten times as long.
LONG = (
    (100, torch.bfloat16),
    *(pytest.param(1000, dtype, marks=pytest.mark.full) for dtype in HALVES),
)


@pytest.mark.long
@pairs()
@pytest.mark.parametrize(("segments", "dtype"), LONG, ids=str)
def test_many_segments_in_half_precision(
    memory: str, family: str, segments: int, dtype: torch.dtype
) -> None:
    model = wrapped(memory, base=build(family).to(dtype))
    with torch.no_grad():
        out = model(text_of(segments))
    assert out.logits.dtype == dtype
    assert bool(out.logits.isfinite().all())
    assert_finite(out.cache)
    assert out.cache.segments.tolist() == [segments] * ROWS
    # The row of random ids has not run away or died.
    logits = out.logits[0].float()
    assert error_of(logits[-SEGMENT:].std(), logits[: 4 * SEGMENT].std()) < 3


@pairs()
def test_a_thousand_segments_of_padding(memory: str, family: str) -> None:
    model = wrapped(memory, base=build(family).to(torch.bfloat16))
    text = torch.zeros(1, 1000 * SEGMENT, dtype=torch.long)
    with torch.no_grad():
        out = model(text, attention_mask=torch.zeros_like(text))
    assert bool(out.logits.isfinite().all())
    assert_finite(out.cache)
    assert out.cache.segments.tolist() == [0]


@pytest.mark.long
@pairs()
def test_training_in_bfloat16(memory: str, family: str) -> None:
    model = wrapped(memory, base=build(family).to(torch.bfloat16)).train()
    text = text_of(20)
    loss = model(text, labels=text).loss
    assert bool(loss.isfinite())
    loss.backward()
    grads = gradients(model)
    assert grads and all(bool(g.isfinite().all()) for g in grads.values())
    names = [n for n, _ in model.named_parameters() if n.startswith("memory")] or list(grads)
    assert any(float(grads[n].abs().max()) > 0 for n in names)


def test_training_where_the_whole_text_is_padding_or_one_row_is(memory: str) -> None:
    model = wrapped(memory, base=build("llama").to(torch.bfloat16)).train()
    text, mask = ids(2, 3 * SEGMENT), torch.ones(2, 3 * SEGMENT, dtype=torch.long)
    mask[1] = 0
    model(text, attention_mask=mask, labels=text).loss.backward()
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())


def test_bfloat16_stays_near_float32(memory: str) -> None:
    """Sums are kept in float32: after many segments the states still agree in kind."""
    text = ids(1, 2 * SEGMENT)
    with torch.no_grad():
        low = wrapped(memory, base=build("llama").to(torch.bfloat16))(text).logits.float()
        high = wrapped(memory)(text).logits
    assert error_of(low, high) < 0.2


def test_autocast(memory: str) -> None:
    model, text = wrapped(memory).train(), ids(2, 6 * SEGMENT + 3)
    want = model(text, labels=text).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(text, labels=text).loss
    assert loss.item() == pytest.approx(want.item(), rel=0.1)
    loss.backward()
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = model.read(text)
        out = model(ids(2, 3), cache=state)
    assert bool(out.logits.isfinite().all())


# Segments, rows and numbers as no test of a method has them


def assert_reads(model: Any, text: Tensor, mask: Tensor | None = None) -> None:
    with torch.no_grad():
        out = model(text, attention_mask=mask, logits_to_keep=1)
    assert bool(out.logits.isfinite().all())
    assert_finite(out.cache)


@pairs()
def test_large_parameters_beside_float16(memory: str, family: str) -> None:
    """What a memory gives is larger than float16 holds: the backbone gets the largest numbers."""
    model = wrapped(memory, base=build(family).to(torch.float16))
    # The backbone projects what attention gives, and may overflow at its largest numbers itself.
    times = 20 if issubclass(memory_class(memory), AttentionMemory) else 300
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter.mul_(times)
        out = model(ids(1, 6 * SEGMENT + 3))
    assert bool(out.logits.isfinite().all())
    assert_finite(out.cache)


KINDS = (torch.float32, *(pytest.param(d, marks=pytest.mark.full) for d in HALVES))


@pytest.mark.long
@pairs()
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_segments_of_one_token(memory: str, family: str, dtype: torch.dtype) -> None:
    """A thousand of them in half precision."""
    tokens = 40 if dtype == torch.float32 else 1000
    assert_reads(wrapped(memory, base=build(family).to(dtype), segment_size=1), ids(2, tokens))


LONGEST = (
    (150, torch.bfloat16),
    pytest.param(300, torch.bfloat16, marks=pytest.mark.slow),
    *(pytest.param(10_000, dtype, marks=pytest.mark.full) for dtype in HALVES),
)


@pytest.mark.long
@pairs()
@pytest.mark.parametrize(("longest", "dtype"), LONGEST, ids=str)
def test_rows_of_one_token_beside_long_ones(
    memory: str, family: str, longest: int, dtype: torch.dtype
) -> None:
    text, mask = padded([ids(1, seed=1), ids(longest, seed=2)], "left")
    assert_reads(wrapped(memory, base=build(family).to(dtype)), text, mask)


EQUAL = (
    (300, torch.float16),
    pytest.param(600, torch.float16, marks=pytest.mark.slow),
    *(pytest.param(100_000, dtype, marks=pytest.mark.full) for dtype in HALVES),
)


# Longer ones make fewer steps of as many tokens, and fewer units that every look-up goes through.
LENGTHS = ("segment_size", "window_size", "block_size", "retrieval_interval")


@pytest.mark.long
@pytest.mark.parametrize(("tokens", "dtype"), EQUAL, ids=str)
def test_equal_tokens(memory: str, tokens: int, dtype: torch.dtype) -> None:
    config, times = tiny(memory), 2 if tokens < 10_000 else 32
    lengths = {name: times * getattr(config, name) for name in LENGTHS if hasattr(config, name)}
    base = build("llama", max_position_embeddings=tokens).to(dtype)
    model = wrapped(memory, base=base, **lengths)
    state = None
    for part in torch.full((1, tokens), 7).split(20_000, 1):
        with torch.no_grad():
            out = model(part, cache=state, use_cache=True, logits_to_keep=1)
        state = out.cache
        assert bool(out.logits.isfinite().all())
        assert_finite(state)
    assert int(state.tokens_seen) == tokens  # type: ignore[union-attr]
