"""The delta rule's kernels: numbers and gradients against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from compare import DEVICE, agree, draw, opcheck
from torch import Tensor

from memwrap_kernels import delta

TOLERANCE = 3e-5 if DEVICE == "cpu" else 3e-3
Leaves = tuple[Tensor | None, ...]


def reference(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor,
    scale: float, l2norm: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token by token; without beta gated linear attention."""
    if l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    group, rows = q.shape[1] // k.shape[1], []
    places = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    last = []
    for n, (a, b) in enumerate(pairwise(places)):
        own = state if cu_seqlens is None else state[n : n + 1]
        for t in range(a, b):
            if g is not None:
                decay = g[:, :, t].exp()
                own = own * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
            change = v[:, :, t]
            if beta is not None:
                change = change - (k[:, :, t, :, None] * own).sum(-2)
                change = change * (beta[:, :, t] if beta.dim() == 4 else beta[:, :, t, None])
            own = own + k[:, :, t, :, None] * change[..., None, :]
            query = q[:, :, t].unflatten(1, (-1, group)) * scale
            rows.append((query[..., None] * own[:, :, None]).sum(-2).flatten(1, 2))
        last.append(own)
    return torch.stack(rows, 2) if rows else v.new_zeros(*q.shape[:3], v.shape[3]), torch.cat(last)


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
    sizes: tuple[int, ...], gated: bool, dtype: torch.dtype, rows: int = 0, unit: bool = True
) -> Leaves:
    batch, heads, own, tokens, keys, values = sizes
    k = draw(batch, own, tokens, keys, seed=2)
    k = k / k.norm(dim=-1, keepdim=True) if unit else k
    return (
        draw(batch, heads, tokens, keys, seed=1, dtype=dtype),
        k.to(dtype),
        draw(batch, own, tokens, values, seed=3, dtype=dtype),
        torch.sigmoid(draw(batch, own, tokens, seed=6)),
        -draw(batch, own, tokens, seed=4).abs() if gated else None,
        draw(rows or batch, own, keys, values, seed=5),
    )


def exact(leaves: Leaves) -> Leaves:
    return tuple(None if x is None else x.double() for x in leaves)


@pytest.mark.parametrize(
    ("sizes", "gated", "l2norm", "dtype"),
    [  # B, H, Hkv, T, Dk, Dv
        ((2, 4, 2, 21, 5, 7), False, False, torch.float32),
        ((1, 1, 1, 80, 20, 40), True, False, torch.float32),  # two chunks, tiles of values
        ((1, 2, 1, 70, 6, 5), False, True, torch.float32),
        ((1, 3, 1, 21, 5, 7), True, True, torch.bfloat16),
        ((1, 1, 1, 1, 1, 1), True, False, torch.float32),
        ((1, 2, 1, 70, 130, 5), True, False, torch.float32),  # wide keys
    ],
)
def test_numbers(sizes: tuple[int, ...], gated: bool, l2norm: bool, dtype: torch.dtype) -> None:
    own = leaves(sizes, gated, dtype, unit=not l2norm)
    want = compared(lambda *x: reference(*x, 0.3, l2norm), exact(own))
    agree(compared(lambda *x: delta.scan(*x, 0.3, l2norm), own), want, TOLERANCE, dtype)


@pytest.mark.parametrize("gated", [False, True])
def test_joined_sequences(gated: bool) -> None:
    cu = torch.tensor([0, 5, 5, 21, 40, 40], device=DEVICE)
    own = leaves((1, 2, 1, 40, 6, 5), gated, torch.float32, rows=5)
    want = compared(lambda *x: reference(*x, 0.3, False, cu), exact(own))
    agree(compared(lambda *x: delta.scan(*x, 0.3, False, cu), own), want, TOLERANCE, torch.float32)


def test_one_key_again_and_again() -> None:
    """beta 1 and one key: the state is the last value. The powers of L would be 1e18 here."""
    v = draw(1, 1, 128, 3, seed=3)
    k = torch.zeros(1, 1, 128, 4, device=DEVICE)
    k[..., 1] = 1.0
    beta, state = torch.ones(1, 1, 128, device=DEVICE), draw(1, 1, 4, 3, seed=5)
    out, last = delta.scan(k, k, v, beta, None, state, 1.0)
    assert float((out - v).abs().max()) < 1e-5
    assert float((last[0, 0, 1] - v[0, 0, -1]).abs().max()) < 1e-5


@pytest.mark.parametrize("beta", ["", "number", "vector"])
@pytest.mark.parametrize("gate", ["", "number", "vector"])
def test_steps(gate: str, beta: str) -> None:
    q, k, v, strength, g, state = leaves((2, 4, 2, 3, 5, 37), True, torch.float32)
    assert g is not None and strength is not None and v is not None and q is not None
    gates = {"": None, "number": g, "vector": -draw(2, 2, 3, 5, seed=8).abs()}
    strengths = {"": None, "number": strength, "vector": strength[..., None].expand_as(v)}
    got = delta.step(q, k, v, gates[gate], strengths[beta], state, 0.3)  # type: ignore[arg-type]
    own = exact((q, k, v, strengths[beta], gates[gate], state))
    for a, b in zip(got, reference(*own, 0.3), strict=True):  # type: ignore[arg-type]
        assert float((a - b).abs().max()) < TOLERANCE * float(b.abs().max())


def test_bad_calls_are_refused() -> None:
    q, k, v, beta, g, state = leaves((1, 1, 1, 2, 4, 3), False, torch.float32)
    with pytest.raises(ValueError, match="value channel"):
        delta.scan(q, k, v, v, g, state, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all of one"):
        delta.step(q.double(), k, v, g, beta, state, 1.0)  # type: ignore[union-attr, arg-type]


@pytest.mark.slow
def test_operators_are_registered_as_torch_wants_them() -> None:
    q, k, v, beta, g, state = leaves((1, 2, 1, 4, 3, 2), True, torch.float32)
    u, w = delta.solved(k, v, beta, g, None)  # type: ignore[arg-type]
    given = [x.detach().requires_grad_() for x in (q, k, u, w, g, state)]  # type: ignore[union-attr]
    opcheck(delta.forward, (*given, None, None, 1.0, torch.float32))
    opcheck(delta.step_op, (q, k, v, g, beta, state, 1.0))


@pytest.mark.slow
def test_compiled_whole() -> None:
    own = leaves((1, 2, 1, 9, 4, 3), True, torch.float32)

    def run(*x: Any) -> Any:
        return delta.scan(*x, 0.3, True)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = compared(lambda *x: reference(*x, 0.3, True), own)
    agree(compared(compiled, own), want, TOLERANCE, torch.float32)


def test_wide_keys_in_float32_are_refused_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their states do not fit into its shared memory; half types' do."""
    wide, beta = torch.zeros(1, 1, 4, 256), torch.zeros(1, 1, 4)
    assert not delta.unsupported(wide, wide, wide, beta)
    monkeypatch.setattr(delta, "is_hip", lambda: True)
    assert "go up to 128" in delta.unsupported(wide, wide, wide, beta)
    half = wide.to(torch.bfloat16)
    assert not delta.unsupported(half, half, half, beta)
    narrow = wide[..., :128]
    assert not delta.unsupported(narrow, narrow, wide, beta)
