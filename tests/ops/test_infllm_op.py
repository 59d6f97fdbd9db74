"""InfLLM's ops: the naive specification against the fast way, and what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memwrap.ops
from memwrap.ops import infllm
from memwrap.ops.buffers import paged

SIZES = st.integers(0, 2**16)


def drawn(*shape: int, seed: int = 0, few: bool = False) -> Tensor:
    """Normal numbers, or a handful of values so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    if few:
        return torch.randint(0, 3, shape, generator=generator).double()
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def both(function, *args):
    with memwrap.ops.backend("naive"):
        want = function(*args)
    with memwrap.ops.backend("torch"):
        got = function(*args)
    return got, want


@pytest.mark.parametrize(("window", "sinks", "block"), [(6, 2, 4), (5, 0, 1), (8, 3, 3)])
def test_what_is_settled_is_what_moving_tokens_one_by_one_gives(
    window: int, sinks: int, block: int
) -> None:
    have, units, live = 0, 0, 0
    for tokens in range(60):
        counts = infllm.settled(torch.tensor([tokens]), window, sinks, block)
        assert [int(c) for c in counts] == [have, units], tokens
        live += 1
        if have < sinks and live > window:
            have, live = have + 1, live - 1
        if live - block >= window:
            units, live = units + 1, live - block


@given(SIZES, st.integers(0, 9), st.integers(1, 5))
def test_the_mean_query_since_the_last_selection(seed: int, length: int, interval: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = drawn(3, 2, length, 4, seed=seed)
    valid = torch.rand(3, length, generator=generator) < 0.7
    place = torch.randint(0, 5, (3, 1), generator=generator) + valid.cumsum(1)
    starts = valid & (place % interval == 0)
    total = drawn(3, 2, 4, seed=seed + 1)
    count = torch.randint(0, 4, (3,), generator=generator)
    got, want = both(
        infllm.gather_queries, query, starts, valid, total * (count > 0)[:, None, None], count
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(SIZES, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_selection(seed: int, number: int, top_k: int, few: bool) -> None:
    query, rep = drawn(2, 3, 4, 5, seed=seed), drawn(2, number, 4, 5, seed=seed + 1)
    got, want = both(infllm.unit_scores, query, rep)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    scores = drawn(2, 3, number, seed=seed, few=few)
    units = torch.tensor([number, number // 2])
    got, want = both(infllm.select, scores, units, top_k)
    assert torch.equal(got, want)
    assert got.sum(2).tolist() == [[min(top_k, int(n))] * 3 for n in units]


def test_equal_units_are_taken_from_the_end() -> None:
    got = infllm.select(torch.zeros(1, 1, 6), torch.tensor([5]), 2)
    assert got[0, 0].tolist() == [False, False, False, True, True, False]


@given(SIZES, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_representatives(seed: int, block: int, count: int, few: bool) -> None:
    keys, scores = drawn(2, 3, 2, block, 5, seed=seed), drawn(2, 3, 6, block, seed=seed, few=few)
    got, want = both(infllm.representatives, keys, scores, min(count, block))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@given(SIZES, st.integers(1, 6), st.integers(0, 5))
def test_received_products(seed: int, length: int, keys: int) -> None:
    query, key = drawn(2, 6, length, 4, seed=seed), drawn(2, 3, keys, 4, seed=seed + 1)
    visible = drawn(2, length, keys, seed=seed + 2) > 0
    got, want = both(infllm.received_products, query, key, visible)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


# Pages


@given(
    SIZES, st.integers(1, 4), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6)
)
def test_pages_are_lists(seed: int, size: int, steps: list[tuple[int, int]]) -> None:
    """Rows get different numbers of entries; what was there stays the same object or the same."""
    store = {"0": {"a": torch.zeros(2, 0, 3, dtype=torch.float64)}}
    lists: list[list[Tensor]] = [[], []]
    for index, step in enumerate(steps):
        new, more = drawn(2, max(step), 3, seed=seed + index), torch.tensor(step)
        counts = torch.tensor([len(row) for row in lists])
        after = paged.append(store, counts, {"a": new}, more, size)
        full = min(len(row) for row in lists) // size
        assert all(after[str(p)]["a"] is store[str(p)]["a"] for p in range(full))
        store = after
        for row, count in enumerate(step):
            lists[row] += list(new[row, :count])
    longest = max(len(row) for row in lists)
    assert paged.number_of(store) == longest
    assert all(p["a"].shape[1] <= size for p in store.values())
    want = [(row, n) for row in (1, 0) for n in range(len(lists[row]))][::-1]
    rows, entries = [row for row, _ in want], [n for _, n in want]
    (got,) = paged.take(store, ("a",), rows, entries, size)
    assert got.shape == (len(want), 3)
    assert all(torch.equal(g, lists[row][n]) for g, (row, n) in zip(got, want, strict=True))
    for row in (0, 1):  # and zeros behind a shorter row's own
        rest = range(len(lists[row]), longest)
        (tail,) = paged.take(store, ("a",), [row] * len(rest), list(rest), size)
        assert not tail.any()


@given(SIZES, st.integers(1, 6))
def test_slots_never_change_a_result(seed: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stores = [
        {"0": {"a": drawn(2, 4, 3, seed=s), "b": drawn(2, 4, 1, seed=s)},
         "1": {"a": drawn(2, 3, 3, seed=s + 9), "b": drawn(2, 3, 1, seed=s + 9)}}
        for s in (seed, seed + 1)
    ]  # fmt: skip
    cache = paged.SlotCache(slots)
    with torch.no_grad():
        for _ in range(12):
            store = stores[int(torch.randint(2, (1,), generator=generator))]
            count = int(torch.randint(0, 6, (1,), generator=generator))
            rows = torch.randint(0, 2, (count,), generator=generator).tolist()
            entries = torch.randint(0, 7, (count,), generator=generator).tolist()
            want = paged.take(store, ("a", "b"), rows, entries, 4)
            got = cache.take(store, ("a", "b"), rows, entries, 4, torch.device("cpu"))
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_the_least_recently_used_slot_goes() -> None:
    store = {"0": {"a": drawn(1, 4, 2)}}
    cache = paged.SlotCache(2)
    with torch.no_grad():
        for entries in ([0], [1], [0], [2], [0], [1]):
            cache.take(store, ("a",), [0] * len(entries), entries, 4, torch.device("cpu"))
    assert (cache.hits, cache.misses) == (2, 4)  # 0 stays, 1 made room for 2
    assert cache.nbytes == 2 * 2 * 8
