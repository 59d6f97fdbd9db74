"""The ops hand over to the kernels, and get what the chunked implementation gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memwrap.ops import backend, delta, gla, landmark


def agree(call: object, *inputs: Tensor, tolerance: float = 2e-5) -> None:
    """Outputs and gradients under both backends."""
    found = {}
    for name in ("torch", "triton"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with backend(name):
            outputs = call(*leaves)  # type: ignore[operator]
        sum((o * torch.linspace(0.5, 1, o.numel()).view_as(o)).sum() for o in outputs).backward()
        found[name] = [*[o.detach() for o in outputs], *[x.grad for x in leaves]]
    for mine, want in zip(found["triton"], found["torch"], strict=True):
        assert (mine - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def test_gated_linear_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 7, 16) for h in (2, 1, 1))
    g, state = -torch.rand(1, 1, 7, 16), torch.randn(1, 1, 16, 16)
    agree(lambda *x: gla.scan(*x), q, k, v, g, state)
    with torch.no_grad():  # few tokens without gradients are decoded in one launch
        few = [x[:, :, :3] for x in (q, k, v, g)]
        with backend("triton"):
            got = gla.scan(*few, state)
        want = gla.scan(*few, state)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_delta_rule() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 7, 16) for h in (2, 1, 1))
    beta, g, state = torch.rand(1, 1, 7), -torch.rand(1, 1, 7), torch.randn(1, 1, 16, 16)
    agree(lambda *x: delta.scan(*x, l2norm=True), q, k, v, beta, g, state)
    with backend("triton"), pytest.raises(ValueError, match="a beta for each value channel"):
        delta.scan(q, k, v, torch.rand(1, 1, 7, 16))


def test_delta_rule_where_the_kernels_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op asks the kernels themselves, and says that torch can do it."""
    wide, beta = torch.randn(1, 1, 2, 256), torch.rand(1, 1, 2)
    monkeypatch.setattr("memwrap_kernels.delta.is_hip", lambda: True)
    with backend("triton"), pytest.raises(ValueError, match=r"go up to 128\. Use 'torch'\."):
        delta.scan(wide, wide, wide, beta)
    assert bool(delta.scan(wide, wide, wide, beta, l2norm=True)[0].isfinite().all())


def test_landmark_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 16) for h in (2, 1, 1))
    agree(lambda *x: landmark.attention(*x, 3), q, k, v)
    with backend("triton"), pytest.raises(ValueError, match="a soft cap or a window"):
        landmark.attention(q, k, v, 3, softcap=5.0)


def test_chosen_blocks() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 3, 2, 16)
    keys, values, marks = (
        torch.randn(1, 1, 4, 5, 16),
        torch.randn(1, 1, 4, 5, 16),
        torch.randn(1, 1, 4, 16),
    )
    valid, ids = torch.ones(1, 4, 5, dtype=torch.bool), torch.randint(0, 5, (1, 2, 3, 2))
    arguments = (q, keys, values, marks, valid, ids, 0.25, 10.0)
    with torch.no_grad():
        want = landmark.retrieved(*arguments)
        with backend("triton"):
            got = landmark.retrieved(*arguments)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
