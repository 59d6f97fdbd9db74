"""Gated linear attention's kernels: numbers and gradients against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from compare import DEVICE, agree, draw, opcheck
from torch import Tensor

from memwrap_kernels import gla

# float32 sums in another order; on a GPU half types multiply in TF32 (11 bits).
TOLERANCE = 3e-5 if DEVICE == "cpu" else 3e-3
Leaves = tuple[Tensor | None, ...]


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token by token."""
    if cu_seqlens is not None:
        outs, last = [], []
        places = cu_seqlens.tolist()
        for n, (a, b) in enumerate(pairwise(places)):
            own = None if g is None else g[:, :, a:b]
            part = reference(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], own, state[n : n + 1], scale)
            outs.append(part[0])
            last.append(part[1])
        return torch.cat(outs, 2), torch.cat(last)
    group, rows = q.shape[1] // k.shape[1], []
    for t in range(q.shape[2]):
        if g is not None:
            decay = g[:, :, t].exp()
            state = state * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        query = q[:, :, t].unflatten(1, (-1, group)) * scale
        rows.append((query[..., None] * state[:, :, None]).sum(-2).flatten(1, 2))
    return torch.stack(rows, 2) if rows else v.new_zeros(*q.shape[:3], v.shape[3]), state


def compared(function: Callable[..., tuple[Tensor, Tensor]], leaves: Leaves) -> list[Tensor]:
    """Outputs and the gradients of their weighted sum."""
    own = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    outputs = function(*own)
    loss = sum(
        (x * draw(*x.shape, seed=70 + n, dtype=x.dtype)).sum() for n, x in enumerate(outputs)
    )
    grads = torch.autograd.grad(loss, [x for x in own if x is not None])  # type: ignore[arg-type]
    return [x.detach().float().cpu() for x in (*outputs, *grads)]


def leaves(
    sizes: tuple[int, ...], gate: str, dtype: torch.dtype, strength: float = 1.0, rows: int = 0
) -> Leaves:
    batch, heads, own, tokens, keys, values = sizes
    shape = {"vector": (batch, own, tokens, keys), "number": (batch, own, tokens)}.get(gate)
    g = None if shape is None else -draw(*shape, seed=4).abs() * strength
    return (
        draw(batch, heads, tokens, keys, seed=1, dtype=dtype),
        draw(batch, own, tokens, keys, seed=2, dtype=dtype),
        draw(batch, own, tokens, values, seed=3, dtype=dtype),
        g,
        draw(rows or batch, own, keys, values, seed=5),
    )


@pytest.mark.parametrize(
    ("sizes", "gate", "strength", "dtype"),
    [  # B, H, Hkv, T, Dk, Dv
        ((2, 4, 2, 21, 5, 7), "vector", 1.0, torch.float32),
        ((1, 1, 1, 80, 40, 70), "vector", 0.05, torch.float32),  # two chunks, tiles of channels
        ((1, 2, 1, 37, 20, 9), "vector", 40.0, torch.float32),  # gates that forget all
        ((1, 3, 1, 21, 5, 7), "vector", 1.0, torch.bfloat16),
        ((2, 2, 1, 70, 36, 5), "number", 0.3, torch.float32),
        ((1, 1, 1, 18, 4, 4), "number", 30.0, torch.float16),
        ((1, 2, 1, 70, 5, 40), "", 0.0, torch.float32),
        ((1, 1, 1, 1, 1, 1), "vector", 1.0, torch.float32),
    ],
)
def test_numbers(sizes: tuple[int, ...], gate: str, strength: float, dtype: torch.dtype) -> None:
    own = leaves(sizes, gate, dtype, strength)
    want = compared(
        lambda *x: reference(*x, 0.3), tuple(None if x is None else x.double() for x in own)
    )
    agree(compared(lambda *x: gla.scan(*x, 0.3), own), want, TOLERANCE, dtype)


@pytest.mark.parametrize("gate", ["vector", "number"])
def test_joined_sequences(gate: str) -> None:
    """Of lengths 0, less than a chunk, one chunk and more; an empty one in between and last."""
    cu = torch.tensor([0, 5, 5, 21, 40, 40], device=DEVICE)
    own = leaves((1, 2, 1, 40, 6, 5), gate, torch.float32, rows=5)
    want = compared(
        lambda *x: reference(*x, 0.3, cu), tuple(None if x is None else x.double() for x in own)
    )
    agree(compared(lambda *x: gla.scan(*x, 0.3, cu), own), want, TOLERANCE, torch.float32)


def test_views_in_any_layout() -> None:
    q, k, v = (draw(1, 19, 2, 4, seed=n).transpose(1, 2) for n in (1, 2, 3))
    g, state = -draw(1, 19, 2, seed=4).abs().transpose(1, 2), draw(1, 2, 4, 4, seed=5)
    odd = k.transpose(2, 3).contiguous().transpose(2, 3)
    for a, b in zip(
        gla.scan(q, odd, v, g, state.transpose(2, 3), 1.0),
        reference(q, k, v, g, state.transpose(2, 3), 1.0),
        strict=True,
    ):
        assert float((a - b).abs().max()) < TOLERANCE * float(b.abs().max())


def test_no_tokens() -> None:
    q, k, v, g, state = leaves((2, 2, 1, 0, 4, 3), "vector", torch.float32)
    assert q is not None and state is not None
    q, state = q.requires_grad_(), state.requires_grad_()
    out, last = gla.scan(q, k, v, g, state, 1.0)  # type: ignore[arg-type]
    assert out.shape == (2, 2, 0, 3) and torch.equal(last, state)
    (out.sum() + last.sum()).backward()
    assert state.grad is not None and bool((state.grad == 1).all())


def test_bad_calls_are_refused() -> None:
    q, k, v, g, state = leaves((1, 1, 1, 2, 4, 3), "", torch.float32)
    with pytest.raises(ValueError, match="all of one"):
        gla.scan(q.double(), k, v, g, state, 1.0)  # type: ignore[union-attr, arg-type]


@pytest.mark.slow
def test_operator_is_registered_as_torch_wants_it() -> None:
    own = leaves((1, 2, 1, 4, 3, 2), "vector", torch.float32)
    given = [None if x is None else x.requires_grad_() for x in own]
    opcheck(gla.forward, (*given, None, None, 1.0))


@pytest.mark.slow
def test_compiled_whole() -> None:
    own = leaves((1, 2, 1, 9, 4, 3), "vector", torch.float32)
    cu = torch.tensor([0, 4, 9], device=DEVICE)
    own = (*own[:4], draw(2, 1, 4, 3, seed=5))

    def run(*x: Any) -> Any:
        return gla.scan(*x, 0.3, cu)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = compared(lambda *x: reference(*x, 0.3, cu), own)
    agree(compared(compiled, own), want, TOLERANCE, torch.float32)
