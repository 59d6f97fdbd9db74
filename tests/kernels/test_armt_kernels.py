"""The associative memory's kernels: numbers and gradients against naive and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import DEVICE, agree, draw, opcheck, results
from torch import Tensor

from memwrap.ops import associative, backend

TOLERANCE = 2e-5 if DEVICE == "cpu" else 5e-3


def leaves(
    dtype: torch.dtype, *, filled: str, z: bool, gating: bool, nu: int = 3,
    sizes: tuple[int, ...] = (2, 2, 5, 3, 5),
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """q, k, v, beta, A and perhaps z; which rows were written before."""
    batch, heads, tokens, width, values = sizes
    written = torch.ones(batch, dtype=torch.bool, device=DEVICE)
    if filled != "full":
        written[slice(None) if filled == "empty" else slice(0, None, 2)] = False
    features = 2 * nu * width
    scale = written.view(-1, 1, 1, 1).float()
    found = [
        draw(batch, heads, tokens, width, seed=1, dtype=dtype),
        draw(batch, heads, tokens, width, seed=2, dtype=dtype),
        draw(batch, heads, tokens, values, seed=3, dtype=dtype),
        torch.sigmoid(draw(batch, heads, tokens, values if gating else 1, seed=4)),
        draw(batch, heads, features, values, seed=5) * scale,
    ]
    if z:  # 0.05: keys that are new in part, so that gamma is strictly between 0 and 1
        found.append(draw(batch, heads, features, seed=6).abs() * scale[..., 0] * 0.05)
    return found, written


def step(written: Tensor, nu: int, normalize: bool, correction: bool) -> Any:
    def run(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, A: Tensor, z: Tensor | None = None
    ) -> Any:
        out = associative.read_projected(q, A, z, nu=nu, normalize=normalize)
        new_A, new_z = associative.write_projected(
            k, v, beta, A, z, written, nu=nu, normalize=normalize, correction=correction
        )
        return (out, new_A) if new_z is None else (out, new_A, new_z)

    return run


@pytest.mark.parametrize(
    ("filled", "z", "normalize", "gating", "correction", "dtype"),
    [
        ("full", True, False, False, True, torch.float32),
        ("mixed", True, False, True, True, torch.bfloat16),
        ("empty", True, True, False, True, torch.float32),
        pytest.param("mixed", True, True, True, False, torch.float16, marks=pytest.mark.slow),
        pytest.param("full", False, True, False, True, torch.float32, marks=pytest.mark.slow),
        pytest.param("mixed", False, True, True, True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_reads_and_writes_agree(
    filled: str, z: bool, normalize: bool, gating: bool, correction: bool, dtype: torch.dtype
) -> None:
    own, written = leaves(dtype, filled=filled, z=z, gating=gating)
    run = step(written, 3, normalize, correction)
    got = results("triton", run, *own)
    for name in ("torch", "naive"):
        agree(got, results(name, run, *own), TOLERANCE, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nu", "sizes"), [(1, (1, 1, 1, 1, 1)), (2, (1, 1, 70, 70, 68)), (4, (1, 3, 3, 1, 2))]
)
def test_odd_sizes(nu: int, sizes: tuple[int, ...]) -> None:
    """One channel, more rolls than channels, several tiles of everything."""
    own, written = leaves(torch.float32, filled="full", z=True, gating=False, nu=nu, sizes=sizes)
    run = step(written, nu, nu < 4, True)  # four rolls of one channel, normalised: constants
    agree(results("triton", run, *own), results("torch", run, *own), TOLERANCE, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_keys_without_features(normalize: bool) -> None:
    own, written = leaves(torch.float32, filled="full", z=True, gating=False)
    own[0].zero_()
    own[1].zero_()
    run = step(written, 3, normalize, True)
    got = results("triton", run, *own)
    agree(got, results("torch", run, *own), TOLERANCE, torch.float32)
    assert float(got[0].abs().max()) == 0.0 and torch.equal(got[1], own[4].cpu())


def test_no_tokens() -> None:
    own, written = leaves(torch.float32, filled="full", z=True, gating=False)
    empty = [x[:, :, :0].requires_grad_() for x in own[:4]]
    with backend("triton"):
        out, A, z = step(written, 3, False, True)(*empty, *own[4:])
    assert out.shape == (2, 2, 0, 5) and torch.equal(A, own[4]) and torch.equal(z, own[5])
    (out.sum() + A.sum()).backward()


@pytest.mark.slow
def test_operators_are_registered_as_torch_wants_them() -> None:
    from memwrap_kernels import armt

    own, written = leaves(
        torch.float32, filled="mixed", z=True, gating=False, sizes=(2, 1, 3, 2, 2)
    )
    q, k, v, beta, A, z = (x.requires_grad_() for x in own)
    opcheck(armt.read, (q, A, z, 3, False, 1e-5))
    opcheck(armt.write, (k, v, beta, A, z, written, 3, False, True, 1e-5, 1e-5))
    opcheck(armt.write, (k, v, beta, A, None, written, 3, True, True, 0.0, 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_whole(compiler: str) -> None:
    own, written = leaves(torch.float32, filled="mixed", z=True, gating=False)
    run = step(written, 3, False, True)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    want = results("torch", run, *own)
    agree(results("triton", compiled, *own), want, TOLERANCE, torch.float32)
