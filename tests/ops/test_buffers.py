"""Ragged rows in fixed buffers and the search of a cache, against plain Python."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memwrap.ops.buffers import left_aligned, paged
from memwrap.ops.cache_search import search_cache


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def buffer_of(lists: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    buffer = torch.zeros(len(lists), size, 2, dtype=torch.float64)
    for index, values in enumerate(lists):
        buffer[index, : len(values)] = values
    return buffer, torch.tensor([len(values) for values in lists])


@given(st.integers(1, 5), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 7))
def test_appending_is_a_queue(size: int, counts: list[int], more: int) -> None:
    lists = [drawn(min(n, size), 2, seed=n + i) for i, n in enumerate(counts)]
    new = drawn(len(lists), more, 2, seed=9)
    got, count = left_aligned.append(*buffer_of(lists, size), new)
    want = [torch.cat([old, add])[-size:] for old, add in zip(lists, new, strict=True)]
    expected, lengths = buffer_of(want, size)
    assert torch.equal(got, expected) and torch.equal(count, lengths)


@given(st.integers(1, 4), st.integers(0, 7), st.integers(0, 2**20))
def test_the_last_chosen_rows(size: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = drawn(3, length, 2, seed=seed)
    chosen = torch.rand(3, length, generator=generator) < 0.6
    most = torch.randint(0, size + 1, (3,), generator=generator)
    got, count = left_aligned.take_last(values, chosen, most, size)
    want = []
    for row in range(3):
        own = values[row][chosen[row]]
        want.append(own[len(own) - min(len(own), int(most[row])) :])
    expected, lengths = buffer_of(want, size)
    assert torch.equal(got, expected) and torch.equal(count, lengths)
    assert torch.equal(
        left_aligned.take_last(values, chosen, size, size)[1], chosen.sum(1).clamp(max=size)
    )


def test_gradients() -> None:
    buffer, count = drawn(2, 3, 2).requires_grad_(), torch.tensor([1, 3])
    new = drawn(2, 2, 2, seed=1).requires_grad_()
    chosen = torch.tensor([[True, False, True], [False, True, True]])
    assert torch.autograd.gradcheck(lambda b, n: left_aligned.append(b, count, n)[0], (buffer, new))
    assert torch.autograd.gradcheck(lambda b: left_aligned.take_last(b, chosen, 1, 2)[0], (buffer,))
    query, cache = drawn(2, 4, seed=2).requires_grad_(), drawn(2, 3, 4, seed=3).requires_grad_()
    w_query, w_key = (drawn(5, 4, seed=s).requires_grad_() for s in (4, 5))
    arguments = (query, cache, w_query, w_key)
    assert torch.autograd.gradcheck(
        lambda q, c, a, b: search_cache(q, c, torch.tensor([0, 2]), a, b)[0], arguments
    )


def test_a_search_leaves_empty_places_alone() -> None:
    query, cache = drawn(3, 4), drawn(3, 5, 4, seed=1)
    w_query, w_key = drawn(6, 4, seed=2), drawn(6, 4, seed=3)
    count = torch.tensor([0, 2, 5])
    found, weights = search_cache(query, cache, count, w_query, w_key)
    for row, filled in enumerate(count.tolist()):
        keys = cache[row, :filled] @ w_key.T
        want = (keys @ (w_query @ query[row]) / 6**0.5).softmax(0)
        torch.testing.assert_close(weights[row, :filled], want)
        torch.testing.assert_close(found[row], want @ cache[row, :filled])
        assert not weights[row, filled:].any()
    assert not found[0].any()
    low = search_cache(
        query.bfloat16(), cache.bfloat16(), count, w_query.bfloat16(), w_key.bfloat16()
    )
    assert low[0].dtype == torch.float32 and bool(low[0].isfinite().all())


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_rows_that_grow_alike_get_the_pages_of_rows_that_do_not(steps: list[int]) -> None:
    """A shorter row beside it takes the general way, and leaves the row as it is alone."""
    entries, size = drawn(2, sum(steps), 3, seed=len(steps)), 4
    alone, beside = ({"0": {"x": torch.zeros(b, 0, 3, dtype=torch.float64)}} for b in (1, 2))
    at = torch.zeros(2, dtype=torch.long)
    for more in steps:
        new = entries[:, int(at[0]) : int(at[0]) + more]
        grown = torch.tensor([more, more // 2])
        alone = paged.append(alone, at[:1], {"x": new[:1]}, grown[:1], size)
        beside = paged.append(beside, at, {"x": new}, grown, size)
        at = at + grown
    assert paged.number_of(alone) == sum(steps)
    for number, page in alone.items():
        torch.testing.assert_close(page["x"], beside[number]["x"][:1], rtol=0, atol=0)
    order = list(range(sum(steps)))
    for wanted in (order, order[::-1]):
        (got,) = paged.take(alone, ("x",), [0] * len(wanted), wanted, size)
        torch.testing.assert_close(got, entries[0, wanted], rtol=0, atol=0)
