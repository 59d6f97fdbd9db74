"""The compressive memory's kernels: numbers and gradients against naive and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import DEVICE, agree, draw, opcheck, results
from torch import Tensor

import memwrap_kernels
from memwrap.ops import backend, infini
from memwrap_kernels import infini_scan

# Both sum in float32, in another order. On a GPU half types multiply in TF32 (11 bits).
TOLERANCE = 2e-5 if DEVICE == "cpu" else 2e-3
SHAPES = {
    "ragged": (2, 4, 2, 11, 5, 7, 4),  # B, H, Hkv, T, Dk, Dv, segment size
    "multi_query": (1, 3, 1, 9, 16, 33, 9),
    "one_token": (2, 2, 2, 1, 1, 1, 3),
    "tiles": (1, 2, 2, 150, 20, 70, 70),  # several tiles of tokens and values
}


def leaves(shape: str, filled: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, heads, own, tokens, keys, values, _ = SHAPES[shape]
    return (
        draw(batch, heads, tokens, keys, seed=1, dtype=dtype),
        draw(batch, own, tokens, keys, seed=2, dtype=dtype),
        draw(batch, own, tokens, values, seed=3, dtype=dtype),
        draw(batch, own, keys, values, seed=4) * filled,
        draw(batch, own, keys, seed=5).abs() * filled,
    )


def mask_of(shape: str) -> Tensor:
    """Ragged rows; the last row of several is padding throughout."""
    batch, _, _, tokens, *_ = SHAPES[shape]
    mask = draw(batch, tokens, seed=6) > -0.5
    mask[-1] &= batch == 1
    return mask


@pytest.fixture(params=["fused", "launches"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of `scan`."""
    monkeypatch.setattr(infini_scan, "path", request.param)
    return str(request.param)


SCANS = [
    ("ragged", True, True, torch.bfloat16),
    ("ragged", False, True, torch.float16),
    ("multi_query", True, False, torch.bfloat16),
    ("one_token", True, False, torch.float32),
]
LONG_SCANS = [
    pytest.param(*scan, update, marks=pytest.mark.slow)
    for scan in [("ragged", False, False, torch.float32), ("tiles", False, True, torch.float32)]
    for update in infini.UPDATES
]


@pytest.mark.parametrize(
    ("shape", "filled", "masked", "dtype", "update"),
    [
        # The updates in turn, both of them is slow.
        *(pytest.param(*scan, update, marks=() if (first + second) % 2 else pytest.mark.slow)
          for first, scan in enumerate(SCANS) for second, update in enumerate(infini.UPDATES)),
        *LONG_SCANS,
    ],
)  # fmt: skip
def test_scans_agree(
    shape: str, filled: bool, masked: bool, dtype: torch.dtype, update: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both ways of the kernels, torch and naive."""
    mask = mask_of(shape) if masked else None

    def run(*x: Tensor) -> Any:
        return infini.scan(*x, SHAPES[shape][-1], update=update, mask=mask)

    own = leaves(shape, filled, dtype)
    names = ("torch", *(["naive"] if shape != "tiles" else []))
    want = [results(name, run, *own) for name in names]
    for path in ("fused", "launches"):
        monkeypatch.setattr(infini_scan, "path", path)
        got = results("triton", run, *own)
        for reference in want:
            agree(got, reference, TOLERANCE, dtype)


@pytest.mark.parametrize("update", infini.UPDATES)
def test_reads_and_writes_agree(update: str) -> None:
    mask = mask_of("ragged")

    def run(q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor) -> Any:
        out = infini.read(q, M, z)
        return out, *infini.write(k, v, M, z, update=update, mask=mask)

    own = leaves("ragged", True, torch.float32)
    agree(results("triton", run, *own), results("naive", run, *own), TOLERANCE, torch.float32)


def test_views_in_any_layout(path: str) -> None:
    """Heads before or after tokens, expanded rows: what models hand over, without a copy."""
    q, k, v, M, z = leaves("ragged", True, torch.float32)
    seen = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    seen[2] = v[:1].expand_as(v)
    odd = k.transpose(2, 3).contiguous().transpose(2, 3)  # channels are not dense
    for keys in (seen[1], odd):
        with backend("triton"):
            got = infini.scan(seen[0], keys, seen[2], M, z, 4, update="delta")
        want = infini.scan(seen[0], keys, seen[2], M, z, 4, update="delta")
        for a, b in zip(got, want, strict=True):
            assert float((a - b).abs().max()) < TOLERANCE * float(b.abs().max())


@pytest.mark.parametrize("update", infini.UPDATES)
def test_no_tokens(update: str, path: str) -> None:
    q, k, v, M, z = leaves("ragged", True, torch.float32)
    empty = [x[:, :, :0].requires_grad_() for x in (q, k, v)]
    with backend("triton"):
        out, new_M, new_z = infini.scan(*empty, M, z, 4, update=update)
    assert out.shape == (2, 4, 0, 7) and torch.equal(new_M, M) and torch.equal(new_z, z)
    (out.sum() + new_M.sum()).backward()


def test_padding_may_hold_anything(path: str) -> None:
    """NaN in what the mask hides reaches neither the memory nor a gradient."""
    q, k, v, M, z = leaves("ragged", True, torch.float32)
    mask = mask_of("ragged")
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)

    def run(*x: Tensor) -> Any:
        return infini.scan(*x, 4, update="delta", mask=mask)

    got = results("triton", run, q, k, v, M, z)
    agree(got, results("torch", run, q, k, v, M, z), TOLERANCE, torch.float32)


def test_what_the_kernels_cannot_do_is_said() -> None:
    q, k, v, M, z = (x.double() for x in leaves("one_token", True, torch.float32))
    with backend("triton"):
        with pytest.raises(ValueError, match="float32"):
            infini.scan(q, k, v, M, z, 3)
        with pytest.raises(ValueError, match="float64"):
            infini.read(q, M.float(), z.float())
        for dtype, limit in memwrap_kernels.MAX_HEAD_DIM.items():
            wide = torch.zeros(1, 1, 1, limit + 1, device=DEVICE, dtype=dtype)
            own = torch.zeros(1, 1, limit + 1, 1, device=DEVICE)
            with pytest.raises(ValueError, match=f"up to {limit}"):
                infini.read(wide, own, own[..., 0])
            assert infini.read(wide[..., 1:], own[:, :, 1:], own[:, :, 1:, 0]).shape[3] == 1


@pytest.mark.slow
def test_operators_are_registered_as_torch_wants_them() -> None:
    from memwrap_kernels import infini as own

    q, k, v, M, z = (x.requires_grad_() for x in leaves("ragged", True, torch.float32))
    mask = mask_of("ragged")
    opcheck(own.states, (k, v, M, z, mask, 4, True, 1e-10))
    memory, zs = (x.detach().requires_grad_() for x in own.states(k, v, M, z, None, 4, True, 0.0))
    opcheck(own.lookup, (q, memory, zs, 4, 1e-10))
    opcheck(infini_scan.fused, (q, k, v, M, z, mask, 4, True, 1e-10, True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "chosen"), [("eager", "auto"), ("aot_eager", "fused"), ("aot_eager", "launches")]
)
def test_compiled_whole(compiler: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infini_scan, "path", chosen)
    own = leaves("ragged", True, torch.float32)

    def run(q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor) -> Any:
        return infini.scan(q, k, v, M, z, 4, update="delta")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    agree(results("triton", compiled, *own), results("torch", run_torch, *own), TOLERANCE,
          torch.float32)  # fmt: skip


def run_torch(*x: Tensor) -> Any:
    return infini.scan(*x, 4, update="delta")
