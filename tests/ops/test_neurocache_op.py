"""Neurocache's ops: naive and fast agree, gradients are right, context stands where it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.ops import backend, neurocache
from memwrap.ops.neurocache import chunked


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(groups: int = 2, found: int = 6) -> dict[str, Any]:
    """Two rows, three queries, four columns that retrieved; some is not there."""
    valid = torch.rand(2, 4, found, generator=torch.Generator().manual_seed(5)) < 0.7
    valid[1, 0] = False
    return {
        "query": draw(2, 3, 4, 5, seed=1), "states": draw(2, 4, found, 7, seed=2),
        "key_weight": draw(groups, 5, 7, seed=3), "value_weight": draw(groups, 5, 7, seed=4),
        "valid": valid, "column": torch.tensor([[[0, 1], [1, 2], [2, 3]]] * 2),
        "present": torch.tensor([[[False, True], [True, True], [True, True]]] * 2),
    }  # fmt: skip


@pytest.mark.parametrize("layout", neurocache.LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_naive_and_fast_agree(layout: str, groups: int) -> None:
    given = inputs(groups)
    with backend("naive"):
        want = neurocache.attend(**given, layout=layout)
    torch.testing.assert_close(neurocache.attend(**given, layout=layout), want)


def test_layouts_agree_for_one_head_and_differ_for_more() -> None:
    one = [neurocache.attend(**inputs(1), layout=n) for n in neurocache.LAYOUTS]
    torch.testing.assert_close(*one)
    two = [neurocache.attend(**inputs(2), layout=n) for n in neurocache.LAYOUTS]
    assert float((two[0] - two[1]).abs().max()) > 0.1


@pytest.mark.parametrize("layout", neurocache.LAYOUTS)
def test_gradients_and_blocks(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    leaves = {n: t.requires_grad_() for n, t in given.items() if t.is_floating_point()}
    rest = {n: t for n, t in given.items() if n not in leaves}

    def function(*tensors: Tensor) -> Tensor:
        return neurocache.attend(**dict(zip(leaves, tensors, strict=True)), **rest, layout=layout)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    want = function(*leaves.values())
    gradients = torch.autograd.grad(want.square().sum(), list(leaves.values()))
    monkeypatch.setattr(chunked, "_GATHERED_AT_ONCE", 1)  # one query at a time
    got = function(*leaves.values())
    torch.testing.assert_close(got, want)
    others = torch.autograd.grad(got.square().sum(), list(leaves.values()))
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_retrieved_gives_zero() -> None:
    given = inputs()
    given["valid"] = torch.zeros_like(given["valid"])
    assert not neurocache.attend(**given).any()
    empty = inputs(found=0)
    assert not neurocache.attend(**empty).any()


def test_context_is_found_by_place() -> None:
    """Columns of an open segment with gaps: a padding column and rows at other places."""
    keys = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 0, 3]])
    valid = torch.tensor([[True, False, True, True, True], [True, True, True, False, True]])
    queries = torch.tensor([[2, 3], [0, 3]])
    column, there = neurocache.context(queries, keys, valid, 2)
    assert column[0].tolist() == [[2, 3], [3, 4]]
    assert column[1, 1].tolist() == [2, 4] and there.tolist()[1] == [[False, True], [True, True]]
    column, there = neurocache.context(queries, keys, valid, 3, clamp=True)
    assert column[0, 0].tolist() == [0, 2, 3] and column[1, 0].tolist() == [0, 0, 0]
    assert bool(there.all())


@pytest.mark.parametrize(
    ("size", "want"), [(1, [5, 9]), (2, [5, 6, 9, 10]), (4, [4, 5, 6, 7, 8, 9, 10, 11])]
)
def test_neighbours(size: int, want: list[int]) -> None:
    assert neurocache.neighbours(torch.tensor([5, 9]), size).tolist() == want


@pytest.mark.parametrize("similarity", ["l2", "dot"])
def test_buckets(similarity: str) -> None:
    """Exact up to 512 entries; beyond, one entry of a residue class."""
    query, keys = draw(2, 3, 6, seed=1), draw(2, 512, 6, seed=2)
    scores = query @ keys.transpose(-1, -2)
    if similarity == "l2":
        scores = -(query[:, :, None] - keys[:, None]).square().sum(-1)
    got = neurocache.search_buckets(query, keys, 5, similarity)
    assert torch.equal(got, scores.topk(5).indices)
    twice = torch.cat([keys, keys * (1 + 1e-6)], 1)  # entries i and i + 512 share a bucket
    assert torch.equal(neurocache.search_buckets(query, twice, 5, similarity) % 512, got)
    keys = torch.cat([keys[:, :8], torch.zeros(2, 8, 6, dtype=torch.float64)], 1)
    assert int(neurocache.search_buckets(query, keys, 8, similarity).max()) < 8


def test_an_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout"):
        neurocache.attend(**inputs(), layout="mixed")
