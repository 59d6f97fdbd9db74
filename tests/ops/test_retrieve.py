"""Retrieval attention and ring buffers: naive and chunked agree, gradients are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memwrap.ops import backend, retrieve
from memwrap.ops.buffers import filled, ring
from memwrap.ops.retrieve import chunked


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def cache(heads: int = 4, kv_heads: int = 2, count: int = 11, length: int = 5) -> dict[str, Any]:
    """Two rows; the second holds three entries less than the first."""
    valid = filled(torch.tensor([count, max(0, count - 3)]), count)
    return {
        "query": draw(2, heads, length, 6, seed=1), "keys": draw(2, kv_heads, count, 6, seed=2),
        "values": draw(2, kv_heads, count, 3, seed=3), "valid": valid,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(4, 2), (3, 3), (4, 1)]), st.integers(0, 13), st.integers(1, 5),
    st.integers(1, 15), st.sampled_from(retrieve.SIMILARITIES),
    st.sampled_from([None, 0.1]), st.sampled_from([None, 0.7]),
)  # fmt: skip
def test_naive_and_chunked_agree(
    heads: tuple[int, int], count: int, length: int, top_k: int, similarity: str,
    threshold: float | None, softcap: float | None,
) -> None:  # fmt: skip
    inputs = cache(*heads, count, length)
    scale = draw(heads[0], seed=4).abs()
    kwargs: dict[str, Any] = {
        "top_k": top_k, "scale": scale, "similarity": similarity, "threshold": threshold,
        "softcap": softcap,
    }  # fmt: skip
    with backend("naive"):
        want = retrieve.attend(**inputs, **kwargs)
    got = retrieve.attend(**inputs, **kwargs)
    assert torch.equal(got.index, want.index)
    for name in ("out", "logsumexp", "weights"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    there = (got.index >= 0).any(-1)
    torch.testing.assert_close(got.weights.sum(-1), there.double())


def test_chunks_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {n: t for n, t in cache(count=700, length=9).items() if n != "valid"}
    valid = torch.ones(2, 700, dtype=torch.bool)
    valid[1, 100:650] = False

    def run() -> tuple[retrieve.Read, list[Tensor]]:
        own = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        read = retrieve.attend(**own, valid=valid, top_k=16, scale=0.5)
        (read.out.square().sum() + read.logsumexp.sum()).backward()
        return read, [t.grad for t in own.values()]  # type: ignore[misc]

    want, gradients = run()
    monkeypatch.setattr(chunked, "_SCORES_AT_ONCE", 2 * 4 * 128)  # of few queries and entries
    monkeypatch.setattr(chunked, "_ENTRIES_LEAST", 40)
    monkeypatch.setattr(chunked, "_GATHERED_AT_ONCE", 2 * 4 * 16 * 9 * 2)  # 2 queries at a time
    got, others = run()
    assert torch.equal(got.index, want.index)
    torch.testing.assert_close(got.out, want.out)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other)


def test_all_entries_give_full_attention() -> None:
    inputs = cache()
    read = retrieve.attend(**inputs, top_k=99, scale=0.3)
    keys, values = (inputs[n].repeat_interleave(2, 1) for n in ("keys", "values"))
    scores = inputs["query"] @ keys.transpose(-1, -2) * 0.3
    scores = scores.masked_fill(~inputs["valid"][:, None, None], -math.inf)
    torch.testing.assert_close(read.out, scores.softmax(-1) @ values)
    torch.testing.assert_close(read.logsumexp, scores.logsumexp(-1))


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradients(softcap: float | None) -> None:
    inputs = cache(count=7, length=3)
    valid = inputs.pop("valid")
    valid[1] = False  # a row without entries
    scale = draw(4, seed=5).abs().requires_grad_()

    def function(query: Tensor, keys: Tensor, values: Tensor, scale: Tensor) -> Any:
        read = retrieve.attend(query, keys, values, valid, 3, scale=scale, softcap=softcap)
        return read.out, read.logsumexp[:1], read.weights

    tensors = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(function, (*tensors, scale))


def test_what_is_not_retrieved_gets_no_gradient() -> None:
    inputs = cache(count=40)
    inputs["values"].requires_grad_()
    read = retrieve.attend(**inputs, top_k=2, scale=1.0)
    read.out.sum().backward()
    used = torch.zeros(2, 2, 40, dtype=torch.bool)
    for head in range(4):
        for b in range(2):
            used[b, head // 2, read.index[b, head].flatten()] = True
    got = inputs["values"].grad.abs().sum(-1) > 0
    assert torch.equal(got, used) and 0 < int(used.sum()) < used.numel()


def test_nothing_to_retrieve() -> None:
    for count in (0, 4):
        inputs = cache(count=count)
        inputs["valid"][:] = False
        read = retrieve.attend(**inputs, top_k=3, scale=1.0)
        assert not read.out.any() and bool((read.logsumexp == -math.inf).all())
        assert bool((read.index == -1).all()) and not read.weights.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_accumulate_in_float32(dtype: torch.dtype) -> None:
    inputs = {n: t if n == "valid" else t.to(dtype) for n, t in cache(count=50).items()}
    read = retrieve.attend(**inputs, top_k=4, scale=1.0)
    wide = {n: t if n == "valid" else t.double() for n, t in inputs.items()}
    index = read.index
    want = retrieve.attend_to(wide["query"], wide["keys"], wide["values"], index, scale=1.0)
    assert read.out.dtype == torch.float32
    torch.testing.assert_close(read.out.double(), want.out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 1])
def test_of_equal_entries_the_first_are_taken(
    chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(chunked, "_SCORES_AT_ONCE", chunk)
    keys = draw(1, 1, 600, 6).repeat(1, 1, 2, 1)
    query = torch.cat([torch.zeros(1, 1, 1, 6), draw(1, 1, 3, 6, seed=1)], 2)
    valid = torch.ones(1, 1200, dtype=torch.bool)
    found, index = retrieve.search(query, keys, valid, 5)
    assert index[0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    with backend("naive"):
        want = retrieve.search(query[:, :, :2], keys, valid, 5)
    assert torch.equal(index[:, :, :2], want[1])
    torch.testing.assert_close(found[:, :, :2], want[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 999), st.sampled_from([640, 661, 1280]), st.integers(1, 11),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from(["plain", "equal", "few", "nan"]),
)  # fmt: skip
def test_the_largest_are_found_as_by_a_sort(
    seed: int, total: int, count: int, dtype: torch.dtype, kind: str
) -> None:
    """Also of many equal scores, of few that are there, and beside what is no number."""
    scores = draw(2, 3, 5, total, seed=seed, dtype=dtype)
    if kind == "equal":
        scores = (scores * 4).round()
    elif kind == "few":
        scores[0, :, :, count // 2 :] = -math.inf
        scores[1, :, :, count:] = -math.inf
    elif kind == "nan":
        scores[0, 0, 0, 0] = math.nan
        assert chunked.first_largest(scores, count)[0][0, 1:].isfinite().all()
        scores = scores[1:]
    order = scores.sort(dim=-1, descending=True, stable=True)
    values, places = chunked.first_largest(scores, count)
    there = values > -math.inf
    assert torch.equal(values, order.values[..., :count])
    assert torch.equal(places[there], order.indices[..., :count][there])


def test_an_unknown_similarity() -> None:
    with pytest.raises(ValueError, match="similarity"):
        retrieve.attend(**cache(), top_k=2, scale=1.0, similarity="cos")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 7),
    st.lists(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=2),
             max_size=6),
)  # fmt: skip
def test_a_ring_keeps_the_last_entries(size: int, writes: list[list[list[bool]]]) -> None:
    """Against two plain lists, for writes with gaps, longer than the ring, and none at all."""
    buffer, count = torch.zeros(2, 1, 0, 1), torch.zeros(2, dtype=torch.long)
    plain: list[list[float]] = [[], []]
    for number, write in enumerate(writes):
        valid = torch.tensor(write)
        rows = 1 + number * 10 + torch.arange(8.0).view(2, 1, 4, 1)
        place = ring.slots(count, valid, size)
        count = count + valid.sum(1)
        buffer = ring.store(buffer, place, rows, ring.capacity(count, buffer.shape[2], size))
        for row in range(2):
            plain[row] += rows[row, 0, valid[row], 0].tolist()
    assert count.tolist() == [len(p) for p in plain]
    assert buffer.shape[2] == min(size, max(len(p) for p in plain))
    number = ring.entries(count, buffer.shape[2], size)
    for row in range(2):
        there = filled(count, buffer.shape[2])[row]
        assert torch.equal(there, number[row] >= 0)
        found = {int(n): float(x) for n, x in zip(number[row], buffer[row, 0, :, 0], strict=True)}
        found.pop(-1, None)
        last = dict(enumerate(plain[row][-size:], max(0, len(plain[row]) - size)))
        assert found == last
        assert not buffer[row, 0, ~there].any()
