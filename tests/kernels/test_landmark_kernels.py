"""Landmark attention's kernels: numbers and gradients against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import DEVICE, agree, draw, opcheck
from torch import Tensor

from memwrap_kernels import landmark

TOLERANCE = 2e-5 if DEVICE == "cpu" else 2e-3


def reference(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scaling: float,
    places: Tensor | None = None, landmark: Tensor | None = None, valid: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two softmaxes over all pairs."""
    group, (queries, tokens) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    x = q @ k.transpose(-1, -2) * scaling
    j, stride = torch.arange(tokens, device=q.device), block_size + 1
    own_places = j[tokens - queries :].expand(len(q), -1)
    p = own_places if places is None else places
    last = p - (p % stride == block_size if landmark is None else landmark).long()
    p, last = p[:, None, :, None], last[:, None, :, None]
    section, marks = j // stride, j % stride == block_size
    real = torch.ones_like(x, dtype=torch.bool) if valid is None else valid[:, None, None]
    if documents is not None:
        mine = documents.gather(1, (p // stride).view(len(q), -1))
        real = real & (documents[:, section][:, None] == mine[:, :, None])[:, None]
    own = (section == p // stride) & (j <= last) & ~marks & real
    earlier = (section < p // stride) & real
    tokens_of = torch.stack([(earlier & ~marks & (section == s)).any(-1) for s in section], -1)
    outer = (own | (earlier & marks & tokens_of)).expand(x.shape)
    lse = x.masked_fill(~outer, -torch.inf).logsumexp(-1)
    top = (x - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp().masked_fill(~outer, 0.0)
    weights = top.masked_fill(marks, 0.0)
    for s in range(tokens // stride):
        inside = earlier & (section == s) & ~marks
        some = inside.any(-1, keepdim=True)
        inner = x.masked_fill(~(inside | ~some), -torch.inf).softmax(-1) * inside
        weights = weights + top[..., s * stride + block_size, None] * inner
    return weights @ v, lse.clamp_min(torch.finfo(torch.float32).min)


def compared(
    function: Callable[..., tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...]
) -> list[Tensor]:
    """Output, log-sum-exp where something is seen, and the gradients of their weighted sum."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in leaves)
    out, lse = function(*leaves)
    lse = lse.masked_fill(lse < -1e30, 0.0)
    loss = (out * draw(*out.shape, seed=70, dtype=out.dtype)).sum()
    loss = loss + (lse * draw(*lse.shape, seed=71, dtype=lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [x.detach().float().cpu() for x in (out, lse, *grads)]


def more(name: str, batch: int, queries: int, tokens: int, block_size: int) -> dict[str, Tensor]:
    """The optional arguments of a call."""
    found: dict[str, Tensor] = {}
    if "documents" in name:  # two sections each, in the last row
        sections = -(-tokens // (block_size + 1))
        documents = torch.arange(sections).expand(batch, -1) // 2 * torch.arange(batch)[:, None]
        found["documents"] = documents.to(DEVICE)
    if "valid" in name:
        found["valid"] = draw(batch, tokens, seed=4) > -0.8
        found["valid"][0, :block_size] = False  # a section of nothing but its landmark
        found["valid"][0, block_size] = True
    if "places" in name:  # rows that lag behind, and a landmark that closes its section early
        places = torch.arange(tokens - queries, tokens) - 3 * torch.arange(batch)[:, None]
        found["places"] = places.clamp_min(0).to(DEVICE)
        marks = found["places"] % (block_size + 1) == block_size
        marks[:, -1] = True
        found["landmark"] = marks
    return found


@pytest.mark.parametrize(
    ("sizes", "block_size", "given", "dtype"),
    [  # B, H, Hkv, Tq, Tk, D
        ((1, 2, 1, 23, 23, 20), 4, "", torch.float32),  # many sections a tile, a partial one
        ((2, 2, 1, 67, 67, 8), 15, "documents valid", torch.float32),  # landmark inside the tile
        ((1, 1, 1, 81, 81, 16), 16, "", torch.bfloat16),  # landmark beside the tile
        ((2, 2, 1, 21, 87, 8), 40, "places", torch.float32),  # history; two tiles a section
        pytest.param(
            (2, 1, 1, 60, 200, 16),
            66,
            "documents places valid",
            torch.float16,
            marks=pytest.mark.slow,
        ),
        ((1, 3, 1, 1, 12, 5), 3, "", torch.float32),  # one query
        ((1, 1, 1, 9, 9, 3), 1, "", torch.float32),
    ],
)
def test_numbers(sizes: tuple[int, ...], block_size: int, given: str, dtype: torch.dtype) -> None:
    batch, heads, own, queries, tokens, width = sizes
    leaves = (
        draw(batch, heads, queries, width, seed=1, dtype=dtype),
        draw(batch, own, tokens, width, seed=2, dtype=dtype),
        draw(batch, own, tokens, width, seed=3, dtype=dtype),
    )
    options = more(given, batch, queries, tokens, block_size)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return landmark.attention(*x, block_size, scaling=0.4, **options)

    def naive(*x: Tensor) -> tuple[Tensor, Tensor]:
        return reference(*x, block_size, 0.4, **options)

    want = compared(naive, tuple(x.double() for x in leaves))
    # Half types round the weights and their gradients before they are multiplied.
    tolerance = TOLERANCE if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    agree(compared(run, leaves), want, tolerance, dtype)


def test_what_sees_nothing_reads_nothing() -> None:
    q, k, v = (draw(1, 2, 13, 4, seed=n).requires_grad_() for n in (1, 2, 3))
    valid = torch.arange(13, device=DEVICE)[None] >= 6  # padding on the left
    out, lse = landmark.attention(q, k, v, 4, valid=valid)
    least = torch.finfo(torch.float32).min
    assert bool((out[:, :, :5] == 0).all()) and bool((lse[:, :, :5] == least).all())
    out.sum().backward()
    assert q.grad is not None and bool((q.grad[:, :, :5] == 0).all())
    assert k.grad is not None and bool((k.grad[:, :, :6] == 0).all())
    assert bool(torch.cat([k.grad, q.grad]).isfinite().all())


def test_views_in_any_layout() -> None:
    q, k, v = (draw(1, 11, 2, 4, seed=n).transpose(1, 2) for n in (1, 2, 3))
    odd = k.transpose(2, 3).contiguous().transpose(2, 3)
    got, _ = landmark.attention(q, odd, v, 4)
    want, _ = reference(q, k, v, 4, 0.5)
    assert float((got - want).abs().max()) < TOLERANCE


def test_no_queries() -> None:
    q, k, v = (draw(2, 2, 0, 4, seed=1).requires_grad_() for _ in range(3))
    out, lse = landmark.attention(q, k, v, 4)
    assert out.shape == q.shape and lse.shape == (2, 2, 0)
    out.sum().backward()


def test_bad_calls_are_refused() -> None:
    q, k = draw(1, 2, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    with pytest.raises(ValueError, match="`block_size` is 0"):
        landmark.attention(q, k, k, 0)
    with pytest.raises(ValueError, match="all of one"):
        landmark.attention(q.double(), k, k, 2)
    with pytest.raises(ValueError, match="give `places`"):
        landmark.attention(q, k[:, :, :2], k[:, :, :2], 2)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        landmark.attention(q, k[..., :2], k[..., :2], 2)
    with pytest.raises(ValueError, match="goes up to 64"):
        landmark.attention(*(torch.zeros(1, 1, 1, 65) for _ in range(3)), 2)
    with pytest.raises(ValueError, match="a soft cap"):
        landmark.attention(q, k, k, 2, softcap=30.0)


@pytest.mark.slow
def test_operator_is_registered_as_torch_wants_it() -> None:
    q, k, v = (draw(1, 2, 5, 4, seed=n).requires_grad_() for n in (1, 2, 3))
    starts = torch.tensor([[0] * 4 + [4]], dtype=torch.int32, device=DEVICE)
    opcheck(landmark.forward, (q, k, v, None, None, starts, None, 3, 0.5))


def test_compiled_whole() -> None:
    leaves = (draw(1, 2, 9, 4, seed=1), draw(1, 1, 9, 4, seed=2), draw(1, 1, 9, 4, seed=3))

    def run(*x: Tensor) -> Any:
        return landmark.attention(*x, 3)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = compared(lambda *x: reference(*x, 3, 0.5), leaves)
    agree(compared(compiled, leaves), want, TOLERANCE, torch.float32)


@pytest.mark.parametrize(
    ("shared", "softcap", "dtype"),
    [(False, None, torch.float32), (True, 2.0, torch.float32), (False, None, torch.bfloat16)],
)
def test_chosen_blocks(shared: bool, softcap: float | None, dtype: torch.dtype) -> None:
    batch, heads, own, queries, chosen, blocks, size, width, values_width = (
        2,
        4,
        2,
        3,
        2,
        5,
        7,
        6,
        9,
    )
    q = draw(batch, heads, queries, chosen, width, seed=1, dtype=dtype)
    keys = draw(batch, own, blocks, size, width, seed=2, dtype=dtype)
    values = draw(batch, own, blocks, size, values_width, seed=3, dtype=dtype)
    marks = draw(batch, own, blocks, width, seed=4, dtype=dtype)
    valid = draw(batch, blocks, size, seed=5) > -0.7
    valid[0, 1] = False
    ids = torch.argsort(draw(batch, heads, 1 if shared else queries, blocks + 1, seed=6), -1)
    ids = ids[..., :chosen]  # N, none, is among them
    ids[1, 0] = blocks
    out, lse = landmark.retrieved(q, keys, values, marks, valid, ids, 0.4, softcap)

    def capped(x: Tensor) -> Tensor:
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    ids = ids.expand(-1, -1, queries, -1)
    for b in range(batch):
        for h in range(heads):
            for t in range(queries):
                gates, parts = [], []
                for r, block in enumerate(ids[b, h, t].tolist()):
                    if block == blocks:
                        continue
                    query, here = q[b, h, t, r].double(), valid[b, block]
                    if not here.any():  # no token: no share
                        continue
                    gates.append(capped(marks[b, h // 2, block].double() @ query * 0.4))
                    x = capped(keys[b, h // 2, block][here].double() @ query * 0.4)
                    parts.append(x.softmax(0) @ values[b, h // 2, block][here].double())
                if not gates:
                    assert bool((out[b, h, t] == 0).all())
                    assert float(lse[b, h, t]) == torch.finfo(torch.float32).min
                    continue
                gate = torch.stack(gates)
                want = gate.softmax(0) @ torch.stack(parts)
                allowed = TOLERANCE + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps)
                assert float((out[b, h, t] - want).abs().max()) < 3 * allowed
                assert float((lse[b, h, t] - gate.logsumexp(0)).abs()) < TOLERANCE
