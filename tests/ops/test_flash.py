"""One softmax over groups of keys on the flash kernel, against a softmax that is written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memwrap.ops import flash
from memwrap.testing.helpers import assert_close

SCALING, WIDTH = 0.25, 8
# Rounding alone: float64 sums of a thousand terms; half types round queries and outputs to 8 bits.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def written_out(groups: list[tuple[Tensor, ...]], other: tuple[Tensor, Tensor]) -> Tensor:
    heads = groups[0][0].shape[1]
    scores, values = [], []
    for query, key, value, visible in groups:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        score = query @ key.mT * SCALING
        scores.append(score.masked_fill(~visible[:, None], -math.inf))
        values.append(value)
    weights = torch.cat([*scores, other[1][..., None]], -1).softmax(-1)
    out = weights[..., :-1] @ torch.cat(values, 2) + weights[..., -1:] * other[0]
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [1, 5, flash.PIECE + 3])
def test_joint_softmax(length: int, groups: int, dtype: torch.dtype) -> None:
    """Outputs and all gradients; queries that see nothing of a group, and groups nobody sees."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(2, *shape, dtype=of, requires_grad=True)

    def group(keys: int) -> tuple[Tensor, ...]:
        shapes = (2 * groups, length), (2, keys), (2, keys)
        return *[normal(*s, WIDTH) for s in shapes], torch.rand(2, length, keys) > 0.5

    given = [group(length + 7), group(4), group(3)]
    given[0][3][:, torch.arange(length), torch.arange(length)] = True
    given[1][3][:, : length // 2] = False
    given[2][3][:] = False
    log = torch.randn(2, 2 * groups, length, dtype=wide)
    log[:, :, 0] = -math.inf
    other = normal(2 * groups, length, WIDTH), log.requires_grad_()
    made = [flash.Group(q, k, v, flash.sights(seen, groups, dtype)) for q, k, v, seen in given]
    got = flash.attend(made, SCALING, other)[0]
    leaves = [*(t for g in given[:2] for t in g[:3]), *other]
    want = written_out([(*(x.to(wide) for x in g[:3]), g[3]) for g in given],
                       (other[0].to(wide), log))  # fmt: skip
    assert_close(got.to(wide), want, TOLERANCE[dtype])
    along = torch.randn_like(want)
    gradients = [torch.autograd.grad((x * along).sum(), leaves) for x in (got.to(wide), want)]
    for mine, right in zip(*gradients, strict=True):
        assert_close(mine.to(wide), right.to(wide), 2 * TOLERANCE[dtype])


def test_a_decoded_token() -> None:
    """The short way for one query, and channels that are cut off."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 1, WIDTH), torch.randn(2, 2, 9, WIDTH)
    value, visible = torch.randn(2, 2, 9, WIDTH), torch.rand(2, 1, 9) > 0.3
    group = flash.Group(query, key, value, flash.sights(visible, 3, torch.float32))
    nothing = torch.zeros(2, 6, 1, WIDTH), torch.full((2, 6, 1), -math.inf)
    with torch.no_grad():
        got, log = flash.attend([group], SCALING, width=5)
        want, of_all = flash.attend([group], SCALING, nothing)
    assert_close(got, want[..., :5], 1e-6)
    assert_close(log, of_all, 1e-6)
    assert_close(want, written_out([(query, key, value, visible)], nothing), 1e-6)


def test_queries_that_see_nothing() -> None:
    """Zeros: one query among others, and all of them."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, WIDTH) for _ in range(3))
    for visible in (
        torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 1, 1]]]) > 0,
        torch.zeros(1, 3, 3) > 0,
    ):
        group = flash.Group(query, key, value, flash.sights(visible, 1, torch.float32))
        out = flash.attend([group, group], SCALING)[0]
        blind = ~visible.any(-1)[0]
        assert bool((out[:, blind] == 0).all()) and bool((out[:, ~blind] != 0).all())


def test_what_is_not_seen_is_left_out() -> None:
    """Windows: a piece attends to the columns alone that one of its queries sees."""
    place = torch.arange(3 * flash.PIECE)
    visible = (place[:, None] >= place) & (place[:, None] - place < 50)
    cut = flash.sights(visible[None], 1, torch.float32)
    assert [s.keys.start for s in cut if s] == [0, flash.PIECE - 49, 2 * flash.PIECE - 49]
    assert [s.keys.stop for s in cut if s] == [flash.PIECE * n for n in (1, 2, 3)]
    assert flash.sights(visible[None, :, -1:], 1, torch.float32)[:2] == [None, None]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, flash.PIECE + 3])
def test_weights_received(length: int, dtype: torch.dtype) -> None:
    """With and without a graph: the output, and what keys of the first group got from queries that
    count; some queries see nothing at all, some no key of a group."""
    torch.manual_seed(0)
    heads, counted = 6, torch.rand(2, length) > 0.3
    given = []
    for keys in (length + 4, 5, 3):
        shapes = (heads, length), (2, keys), (2, keys)
        tensors = [torch.randn(2, *shape, WIDTH, dtype=dtype) for shape in shapes]
        given.append((*tensors, torch.rand(2, length, keys) > 0.5))
    given[1][3][:, : length // 2] = False
    given[2][3][:] = False
    for group in given:
        group[3][0, -1] = False
    made = [flash.Group(q, k, v, flash.sights(seen, 3, dtype)) for q, k, v, seen in given]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = [
        (q.to(wide) @ k.to(wide).repeat_interleave(3, 1).mT * SCALING).masked_fill(
            ~seen[:, None], -math.inf
        )
        for q, k, _, seen in given
    ]
    weights = torch.cat(scores, -1).softmax(-1).nan_to_num()
    out = weights @ torch.cat([v.to(wide).repeat_interleave(3, 1) for _, _, v, _ in given], 2)
    want = (weights * counted[:, None, :, None]).sum(2)[..., : length + 4]
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            got, received = flash.attend_received(made, SCALING, counted)
        assert_close(got.to(wide), out.transpose(1, 2), TOLERANCE[dtype])
        assert_close(received, want, 10 * TOLERANCE[dtype])
    # The last group attended to before, and merged: nobody sees it.
    beside = torch.randn(2, heads, length, WIDTH, dtype=dtype), scores[2].logsumexp(-1)
    # The second one as well, which some queries see.
    one = scores[1].softmax(-1).nan_to_num() @ given[1][2].to(wide).repeat_interleave(3, 1)
    for groups, other in ((made[:2], beside), (made[::2], (one, scores[1].logsumexp(-1)))):
        for recorded in (False, True):
            with torch.set_grad_enabled(recorded):
                got, received = flash.attend_received(groups, SCALING, counted, other=other)
            assert_close(got.to(wide), out.transpose(1, 2), TOLERANCE[dtype])
            assert_close(received, want, 10 * TOLERANCE[dtype])
