"""Exact search and interpolation, against the plain specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memwrap.ops import backend, neighbours
from memwrap.ops.interpolation import interpolate, naive, neighbour_probabilities


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.sampled_from(["l2", "ip"]), st.integers(1, 7), st.integers(0, 9), st.integers(1, 5),
    st.booleans(),
)  # fmt: skip
def test_blocks_find_what_a_sort_finds(
    metric: str, queries: int, entries: int, k: int, masked: bool
) -> None:
    q, e = drawn(2, 3, queries, 4), drawn(2, 3, entries, 4, seed=1)
    valid = torch.rand(2, 3, entries) < 0.6 if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK", 24)  # many blocks of queries and of entries
        scores, index = neighbours.nearest(q, e, k, metric, valid)
    with backend("naive"):
        want, numbers = neighbours.nearest(q, e, k, metric, valid)
    assert torch.equal(index, numbers)
    assert torch.equal(scores.isinf(), want.isinf())
    assert torch.allclose(scores[scores.isfinite()], want[want.isfinite()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_scores_are_differentiable(metric: str) -> None:
    q, e = drawn(3, 4).requires_grad_(), drawn(6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: neighbours.nearest(a, b, 2, metric)[0], (q, e))


def test_scores_are_exact_far_from_zero() -> None:
    """Expanded distances of vectors far out lose their digits; what is returned has not."""
    e = 30 + torch.rand(50, 8)
    scores, index = neighbours.nearest(e[:5].clone(), e, 1)
    assert torch.equal(index[:, 0], torch.arange(5)) and float(scores.max()) == 0.0


def test_not_all_scores_exist_at_once() -> None:
    seen: list[int] = []
    real = torch.Tensor.topk

    def spy(self: Tensor, *args: object, **kwargs: object) -> object:
        seen.append(self.numel())
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK", 4096)
        patch.setattr(torch.Tensor, "topk", spy)
        neighbours.nearest(torch.randn(500, 8), torch.randn(3000, 8), 4)
    assert max(seen) <= 2 * 4096 < 500 * 3000


def test_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="metric"):
        neighbours.nearest(x, x, 1, "cosine")
    with pytest.raises(ValueError, match="`k` is 0"):
        neighbours.nearest(x, x, 0)


def test_interpolation_is_the_specification() -> None:
    logits, costs = drawn(4, 5, 11), drawn(4, 5, 6, seed=1).abs()
    tokens = torch.randint(0, 11, (4, 5, 6))
    got = interpolate(logits, costs, tokens, 0.3, 0.7)
    want = naive(logits, costs, tokens, 0.3, 0.7)
    assert torch.allclose(got.log_softmax(-1), want, atol=1e-12)
    assert torch.allclose(got.logsumexp(-1), logits.logsumexp(-1), atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda z, d: interpolate(z, d, tokens[:2, :2], 0.3, 0.7),
        (logits[:2, :2].clone().requires_grad_(), costs[:2, :2].clone().requires_grad_()),
    )


def test_neighbours_that_are_not_there() -> None:
    logits = drawn(3, 7)
    costs = torch.tensor([[1.0, 2.0], [1.0, math.inf], [math.inf, math.inf]]).double()
    tokens = torch.tensor([[1, 2], [3, -1], [-1, -1]])
    got = interpolate(logits, costs, tokens, 0.5, 1.0)
    assert torch.equal(got[2], logits[2])
    p = neighbour_probabilities(costs, tokens, 7, 1.0)
    assert p[1, 3] == 1.0 and p[1].sum() == 1.0 and p[2].sum() == 0.0
    leaf = logits.clone().requires_grad_()
    interpolate(leaf, costs, tokens, 0.5, 1.0).sum().backward()
    assert bool(leaf.grad.isfinite().all())  # type: ignore[union-attr]


def test_far_logits_do_not_overflow() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0]])
    got = interpolate(logits, torch.tensor([[1e9]]), torch.tensor([[1]]), 0.25, 1e-3)
    assert torch.allclose(got.softmax(-1), torch.tensor([[0.75, 0.25, 0.0]]))
