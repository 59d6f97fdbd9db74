"""Compaction: the fast implementation against the plain one, solvers, masks, and what must hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.ops import backend
from memwrap.ops import compaction as ops
from memwrap.ops.compaction import chunked
from memwrap.ops.compaction.solvers import bounded_least_squares

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 14, 6


def block(queries: int = 24, tokens: int = TOKENS, **changes: Any) -> ops.KeyValueBlock:
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=draw, dtype=torch.float64)

    made = ops.KeyValueBlock(
        2 * normal(queries, WIDTH), normal(tokens, WIDTH), normal(tokens, 5), WIDTH**-0.5,
        normal(tokens), torch.rand(BATCH, HEADS, tokens, generator=draw) < 0.8,
        (normal(queries).abs() * (normal(queries) > -1)), None,
    )  # fmt: skip
    return replace(made, **changes)


MATCHINGS = {
    "default": {},
    "absolute": {"relative": False},
    "zero": {"towards_old": False, "ridge_of": "largest"},
    "max": {"score": "max", "pooling": "max", "pooling_width": 3},
    "mean": {"score": "mean", "pooling": "mean", "pooling_width": 3, "fit_values": False},
    "bias": {"fit_bias": False, "ridge_of": "one", "ridge": 0.1},
    "omp": {"selection": "omp"},
    "omp-options": {
        "selection": "omp", "choices": 2, "refit_every": 2, "absolute": True, "normalized": True,
        "drop_below": -2.0, "lower": 1e-12,
    },
    "omp-schedule": {"selection": "omp", "schedule": ((2, 1, 1), (None, 2, 3))},
    "published": {"steps": 4, "ridge": 0.0, "towards_old": False},
    "exact": {"ridge": 0.0, "steps": 0},
}  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", MATCHINGS)
def test_both_implementations_agree(
    name: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys and queries that are not there, old biases, and slots that differ by head; the fast
    one takes few queries at a time."""
    monkeypatch.setattr(chunked, "CHUNK", 5 * BATCH * HEADS * TOKENS)
    given, slots = block(softcap=softcap), torch.tensor([4, 6])
    matching = ops.Matching(**MATCHINGS[name])
    found = {}
    for kind in ("naive", "torch"):
        with backend(kind):
            found[kind] = ops.compact(given, slots, matching)
    want, got = found["naive"], found["torch"]
    assert torch.equal(got.index, want.index) and torch.equal(got.filled, want.filled)
    assert got.filled.sum(-1).tolist() == [[4, 6]] * BATCH
    assert (got.bias - want.bias).abs().max() < 1e-9
    assert (got.value - want.value).abs().max() < 1e-8
    with backend("naive"):
        scores = ops.key_scores(given, matching)
    assert (ops.key_scores(given, matching) - scores).abs().max() < 1e-12


def read(query: Tensor, key: Tensor, bias: Tensor, value: Tensor, there: Tensor) -> Any:
    logits = (query @ key.transpose(-1, -2) * WIDTH**-0.5 + bias[..., None, :]).masked_fill(
        ~there[..., None, :], -math.inf
    )
    return torch.softmax(logits, -1) @ value, logits.logsumexp(-1)


def test_slots_stand_for_the_keys_better_than_chosen_keys_alone() -> None:
    given = block(queries=200, tokens=40, bias=None, valid=None, weight=None)
    test = torch.randn(given.query.shape, generator=torch.Generator().manual_seed(9)).double() * 2
    ones = torch.ones(given.key.shape[:3], dtype=torch.bool)
    out, mass = read(test, given.key, torch.zeros(ones.shape), given.value, ones)
    errors = []
    for changes in ({}, {"fit_bias": False, "fit_values": False}):
        slots = ops.compact(given, 16, ops.Matching(**changes))
        key = given.key.gather(2, slots.index[..., None].expand(-1, -1, -1, WIDTH))
        got, lse = read(test, key, slots.bias, slots.value, slots.filled)
        errors.append(((got - out).norm() / out.norm(), ((lse - mass).exp() - 1).abs().mean()))
    (matched, matched_mass), (chosen, chosen_mass) = errors
    # Found: output 0.36 against 0.55, mass 0.14 against 0.35.
    assert matched < 0.75 * chosen and matched_mass < 0.5 * chosen_mass


def test_slots_that_suffice_keep_all() -> None:
    given = block()
    slots = ops.compact(given, TOKENS, ops.Matching())
    for row in range(BATCH):
        for head in range(HEADS):
            places = given.valid[row, head].nonzero()[:, 0]  # type: ignore[index]
            own = slots.filled[row, head]
            assert torch.equal(slots.index[row, head][own], places)
            assert torch.equal(slots.bias[row, head][own], given.bias[row, head][places])  # type: ignore[index]
            assert torch.equal(slots.value[row, head][own], given.value[row, head][places])
    assert torch.equal(slots.ordered().index, slots.index)


def test_bounded_least_squares_converge() -> None:
    """On two nearly equal columns, where clamping is far off: the optimality conditions hold."""
    draw = torch.Generator().manual_seed(1)
    rows = torch.rand(30, 6, generator=draw, dtype=torch.float64)
    rows[:, 1] = rows[:, 0] + 1e-4 * rows[:, 2]
    target = rows @ torch.tensor([3.0, 0.0, 1.0, 0.0, 5.0, 1.0], dtype=torch.float64)
    gram, right = (rows.T @ rows)[None], (rows.T @ target)[None]
    low, high = 0.05, 4.0
    x = bounded_least_squares(gram, right, low, high)[0]
    slope = rows.T @ (rows @ x - target)
    inside = (x > low + 1e-9) & (x < high - 1e-9)
    assert slope[inside].abs().max() < 1e-8
    assert bool((slope[x <= low + 1e-9] > -1e-8).all())
    assert bool((slope[x >= high - 1e-9] < 1e-8).all())


def test_compaction_may_be_repeated() -> None:
    """A kept slot keeps its old bias: mass is carried on, not lost."""
    given = block(queries=100, bias=None, valid=None, weight=None)
    once = ops.compact(given, 8, ops.Matching())
    key = given.key.gather(2, once.index[..., None].expand(-1, -1, -1, WIDTH))
    again = replace(given, key=key, value=once.value, bias=once.bias, valid=once.filled)
    twice = ops.compact(again, 8, ops.Matching(keep_all=False)).ordered()
    back = once.ordered()
    order = once.index.argsort(-1)
    assert torch.equal(twice.index, torch.arange(8).expand(twice.index.shape))
    assert (twice.bias.gather(2, order) - back.bias).abs().max() < 1e-6
    with pytest.raises(ValueError, match="`slots` is -1; a head needs 0 or more"):
        ops.compact(given, -1, ops.Matching())


def test_shares_under_a_cap() -> None:
    shares = torch.tensor([[0.6, 0.2], [0.15, 0.05]])
    assert torch.allclose(
        ops.capped_shares(shares, 0.3), torch.tensor([[0.3, 0.3], [0.3, 0.1]]).double()
    )
    assert ops.slots_of_shares(shares, 10, 16).tolist() == [[12, 12], [12, 4]]


def test_running_means_of_equal_keys_are_exact() -> None:
    """A slot of c equal keys has their mass by its bias log c, and their output by its mean."""
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randn(1, 2, 3, WIDTH, generator=draw, dtype=torch.float64)
    order = torch.tensor([0, 1, 0, 2, 2, 0, 1])
    key, value = kinds[:, :, order], torch.randn(1, 2, 7, 5, generator=draw).double()
    empty = [torch.zeros(1, 2, 4, n).double() for n in (WIDTH, 5)]
    plain = [torch.zeros(1, 2, 4).double() for _ in range(3)]
    valid = torch.ones(1, 7, dtype=torch.bool)
    slots = ops.running_means(
        (*empty, *plain), (key, value, torch.arange(7.0)[None].double()), valid, 0.99
    )  # type: ignore[arg-type]
    assert slots[3][0].tolist() == [[3, 2, 2, 0]] * 2
    query = torch.randn(1, 2, 9, WIDTH, generator=draw).double()
    there = slots[3] > 0
    got = read(query, slots[0], slots[3].clamp_min(1).log(), slots[1], there)
    want = read(query, key, key.new_zeros(1, 2, 7), value, valid[:, None].expand(1, 2, 7))
    for found, wanted in zip(got, want, strict=True):
        assert (found - wanted).abs().max() < 1e-12
