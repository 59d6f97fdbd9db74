"""The grouped softmax and the reading of stored blocks: naive = torch, gradients, tie rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memwrap
from memwrap.ops import landmark as ops
from memwrap.ops.landmark import chunked
from memwrap.testing.helpers import assert_close


def tensors(
    batch: int = 2, heads: int = 4, kv: int = 2, length: int = 11, total: int = 11, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return make(batch, heads, length, 4), make(batch, kv, total, 4), make(batch, kv, total, 3)


def both(function, *args, **kwargs):  # type: ignore[no-untyped-def]
    with memwrap.ops.backend("naive"):
        want = function(*args, **kwargs)
    with memwrap.ops.backend("torch"):
        return function(*args, **kwargs), want


OPTIONS = {
    "plain": {},
    "scaled": {"scaling": 0.7, "softcap": 2.0},
    "windowed": {"window": 2},
    "documents": {"documents": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])},
    "padded": {"valid": torch.arange(11) < torch.tensor([[11], [6]])},
    "holes": {"valid": torch.arange(11) % 5 != 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("block_size", [1, 4, 20])
@pytest.mark.parametrize("length", [11, 2])
def test_torch_equals_naive(name: str, block_size: int, length: int) -> None:
    q, k, v = tensors(length=length)
    own = dict(OPTIONS[name])
    if "valid" in own:
        own["valid"] = own["valid"].expand(2, 11)
    if "documents" in own:
        blocks = -(-11 // (block_size + 1))
        own["documents"] = (torch.arange(blocks) // 2).expand(2, -1) + torch.tensor([[0], [1]])
    (out, log), (want, want_log) = both(ops.attention, q, k, v, block_size, **own)
    assert out.shape == (2, 4, length, 3)
    assert_close(out, want, 1e-12)
    some = want_log > torch.finfo(torch.float64).min / 2
    assert_close(log[some], want_log[some], 1e-12)
    assert torch.equal(log > torch.finfo(torch.float64).min / 2, some)


def test_places_and_a_landmark_that_closes_a_partial_block() -> None:
    """Rows of a batch stand at different places; the landmark behind 2 of 3 tokens is no key."""
    q, k, v = tensors(length=3)
    places = torch.tensor([[4, 5, 6], [8, 9, 10]])
    marks = torch.tensor([[False, False, True], [False, False, True]])
    own = {"places": places, "landmark": marks}
    (out, _), (want, _) = both(ops.attention, q, k, v, 3, **own)
    assert_close(out, want, 1e-12)
    v = v.clone()
    v[:, :, 10] += 100  # the closing landmark's value is nobody's
    assert_close(ops.attention(q, k, v, 3, **own)[0], out, 0)
    one, _ = ops.attention(q[1:, :, 1:2], k[1:, :, :10], v[1:, :, :10], 3)
    assert_close(out[1:, :, 1:2], one, 1e-12)


def test_the_weights_are_those_of_the_paper() -> None:
    """Two blocks of two, by hand: the landmark's share goes to its block's tokens."""
    x = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0, 9.0], dtype=torch.float64)
    landmark = torch.tensor([[False, False, True, False, False, True]])
    seen = torch.ones(1, 1, 6, dtype=torch.bool)
    p, log = ops.grouped_softmax(x.view(1, 1, 1, 6), landmark, seen)
    e = x.exp()
    z = e[2] + e[3] + e[4]
    share = e[2] / z
    want = torch.stack(
        [
            share * e[0] / (e[0] + e[1]),
            share * e[1] / (e[0] + e[1]),
            0 * z,
            e[3] / z,
            e[4] / z,
            0 * z,
        ]
    )
    assert_close(p[0, 0, 0], want, 1e-14)
    assert_close(log[0, 0, 0], z.log(), 1e-14)
    assert p.sum().item() == pytest.approx(1)


def test_a_block_without_a_token_has_no_share() -> None:
    """Padding but for its landmark: the result is that of the text without the block."""
    q, k, v = (t[:, :, -3:] if n == 0 else t for n, t in enumerate(tensors()))
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[:, 4:7] = False  # the second of blocks of 3; its landmark, place 7, stays
    (out, log), (want, want_log) = both(ops.attention, q, k, v, 3, valid=valid)
    assert_close(out, want, 1e-12)
    assert_close(log, want_log, 1e-12)
    rest = [*range(4), *range(8, 11)]
    alone, alone_log = ops.attention(q, k[:, :, rest], v[:, :, rest], 3)
    assert_close(out, alone, 1e-12)
    assert_close(log, alone_log, 1e-12)
    keys, values, landmarks, here = stored()
    here[:, 1] = False
    g = torch.Generator().manual_seed(4)
    asked = torch.randn(2, 4, 6, 2, 4, generator=g, dtype=torch.float64)
    for length in (1, 6):  # one choice for all, one for each
        ids = torch.randint(0, 6, (2, 4, length, 2), generator=g)
        ids[0, 0] = 1
        args = (keys, values, landmarks, here)
        got, want = both(ops.retrieved, asked, *args, ids, 0.6)
        apart = ops.retrieved(asked, *args, ids.masked_fill(ids == 1, 5), 0.6)
        for a, b, c in zip(got, want, apart, strict=True):
            assert_close(a, b, 1e-12)
            assert_close(a, c, 1e-12)
        assert float(got[0][0, 0].abs().max()) == 0


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_gradients(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 1, 4, 8))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, 3, **OPTIONS[name])

    assert torch.autograd.gradcheck(function, (q, k, v))
    with memwrap.ops.backend("naive"):
        want = torch.autograd.grad(function(q, k, v)[0].square().sum(), (q, k, v))
    got = torch.autograd.grad(function(q, k, v)[0].square().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-10)


def test_pieces_of_the_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.requires_grad_() for t in tensors(length=11))
    want = ops.attention(q, k, v, 3)
    grads = torch.autograd.grad(want[0].square().sum() + want[1].sum(), (q, k, v))
    monkeypatch.setattr(chunked, "AT_ONCE", 2 * 4 * 11 * 2)
    got = ops.attention(q, k, v, 3)
    assert_close(got[0], want[0], 1e-12)
    again = torch.autograd.grad(got[0].square().sum() + got[1].sum(), (q, k, v))
    for a, b in zip(again, grads, strict=True):
        assert_close(a, b, 1e-10)


def stored(blocks: int = 5, m: int = 3) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    valid = torch.ones(2, blocks, m, dtype=torch.bool)
    valid[:, -1, 1:] = False
    return make(2, 2, blocks, m, 4), make(2, 2, blocks, m, 3), make(2, 2, blocks, 4), valid


@pytest.mark.parametrize("kind", ["own", "shared", "crowded", "nothing"])
def test_reading_blocks(kind: str) -> None:
    """Crowded: nearly all queries read one block, the others have few readers."""
    keys, values, landmarks, valid = stored()
    g = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, 6, 2, 4, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 6, (2, 4, 1 if kind == "shared" else 6, 2), generator=g)  # 5: none
    if kind == "crowded":
        ids[:, :, 1:] = torch.tensor([3, 5])
    ids[0, 0] = 5
    if kind == "nothing":
        ids[:] = 5
    args = (keys, values, landmarks, valid, ids, 0.6, 3.0)
    (out, log), (want, want_log) = both(ops.retrieved, q, *args)
    assert_close(out, want, 1e-12)
    assert_close(log, want_log, 1e-12)
    assert float(out[0, 0].abs().max()) == 0  # nothing was chosen
    cut = (q[:1, :2, :2], keys[:1, :1], values[:1, :1], landmarks[:1, :1])
    inputs = tuple(t.clone().requires_grad_() for t in cut)
    ids, valid = ids[:1, :2, :2].clamp_max(4), valid[:1]

    def function(*args: Tensor) -> Tensor:
        return ops.retrieved(*args, valid, ids, 0.6)[0]

    assert torch.autograd.gradcheck(function, inputs)


def test_reading_all_blocks_is_attention_over_them() -> None:
    """Stored blocks and the own one, merged, are the grouped softmax over everything."""
    q, k, v = tensors(1, 2, 1, 2, 10)
    want, _ = ops.attention(q, k, v, 3)
    local = ops.attention(q, k[:, :, 8:], v[:, :, 8:], 3)
    keys, values = (t[:, :, :8].unflatten(2, (2, 4)) for t in (k, v))
    ids = torch.arange(2).expand(1, 2, 2, 2)
    past = ops.retrieved(
        q[:, :, :, None].expand(-1, -1, -1, 2, -1), keys[:, :, :, :3], values[:, :, :, :3],
        keys[:, :, :, 3], torch.ones(1, 2, 3, dtype=torch.bool), ids, 0.5,
    )  # fmt: skip
    assert_close(ops.merge(local, past), want, 1e-12)


def test_choice_and_tie_rule() -> None:
    none = -torch.inf
    scores = torch.tensor(
        [[1.0, 3.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, none], [5.0] + [none] * 4]
    )
    assert ops.choose(scores, 2).tolist() == [[3, 4], [2, 3], [0, 5]]
    assert ops.choose(scores, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3], [0, 5, 5, 5]]
    assert ops.choose(scores, 9).shape == (3, 5)


def test_slots() -> None:
    """The survey's example: 100 blocks, R = 3, chosen 3, 97, 99; the last three stand at slots 1 to
    3, that is 3, 2 and 1 blocks back, and old ones at slot 0."""
    count = torch.tensor([100])
    ids = torch.tensor([3, 97, 99]).view(1, 1, 1, 3)
    slots = 4 - ops.read_slots(ids, count, 3)
    assert slots.flatten().tolist() == [0, 2, 3]
    few = ops.read_slots(torch.tensor([0, 1, 2]).view(1, 1, 1, 3), torch.tensor([2]), 3)
    assert few.flatten().tolist()[:2] == [2, 1]
    positions = ops.queries_for(4, 2, torch.tensor([[0, 7]]))
    assert positions.tolist() == [[[5, 10, 15], [12, 17, 22]]]


def test_scores_of_blocks() -> None:
    g = torch.Generator().manual_seed(5)
    landmarks = torch.randn(2, 1, 4, 3, generator=g, dtype=torch.float64)
    q = torch.randn(2, 2, 5, 3, 3, generator=g, dtype=torch.float64)  # R = 2
    count = torch.tensor([4, 1])
    got = ops.block_scores(q, landmarks, count, 0.5)
    for row, slot in ((0, [2, 2, 1, 0]), (1, [0])):
        want = torch.stack([q[row, :, :, s] @ landmarks[row, 0, b] for b, s in enumerate(slot)], -1)
        assert_close(got[row, ..., : len(slot)], 0.5 * want, 1e-12)
    assert bool((got[1, ..., 1:] == -torch.inf).all())


def test_errors() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="block_size"):
        ops.attention(q, k, v, 0)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        ops.attention(q[:, :3], k, v, 4)
    with pytest.raises(ValueError, match="places"):
        ops.attention(q, k[:, :, :5], v[:, :, :5], 4)
