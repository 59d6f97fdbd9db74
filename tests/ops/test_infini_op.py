"""The compressive memory: naive and chunked agree, gradients are right, edges hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memwrap.ops import backend, infini

BACKENDS = ("naive", "torch")
DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def inputs(
    batch: int, heads: int, own: int, tokens: int, keys: int, values: int, *,
    filled: bool = True, dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """q, k, v, M, z; the memory keeps the accumulation dtype."""
    kept = torch.promote_types(dtype, torch.float32)
    return [
        draw(batch, heads, tokens, keys, seed=1, dtype=dtype),
        draw(batch, own, tokens, keys, seed=2, dtype=dtype),
        draw(batch, own, tokens, values, seed=3, dtype=dtype),
        draw(batch, own, keys, values, seed=4, dtype=kept) * filled,
        draw(batch, own, keys, seed=5, dtype=kept).abs() * filled,
    ]


def relative(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    # The inputs are of size 1: what is 0 by cancellation (one channel: a read does not depend on
    # its query) is compared on that scale.
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp_min(0.05))


def both(function: Any) -> tuple[Any, Any]:
    results = []
    for name in BACKENDS:
        with backend(name):
            results.append(function())
    return results[0], results[1]


def test_phi_is_its_definition() -> None:
    x = torch.tensor([-200.0, -20.0, -1.0, -0.0, 0.0, 1e-9, 2.0], dtype=DOUBLE)
    want = torch.where(x > 0, x + 1, x.exp())
    assert torch.allclose(infini.phi(x), want, rtol=1e-15, atol=0)
    assert float(infini.phi(torch.tensor(-20.0))) > 0  # ELU(x) + 1 in float32 would be 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert infini.phi(x.to(dtype)).dtype == torch.float32
    x.requires_grad_()
    infini.phi(x).sum().backward()
    assert torch.allclose(x.grad, want.clamp_max(1), rtol=1e-15, atol=0)  # type: ignore[arg-type]
    huge = torch.tensor([1e4, -1e4, 300.0], requires_grad=True)  # exp(1e4) would be inf
    infini.phi(huge).sum().backward()
    assert bool(huge.grad.isfinite().all())  # type: ignore[union-attr]


@pytest.mark.parametrize("update", infini.UPDATES)
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "segment"),
    [((2, 4, 2, 7, 3, 5), 3), ((1, 3, 1, 8, 4, 4), 4), ((2, 2, 2, 1, 1, 1), 5)],
)
def test_scans_agree(
    shape: tuple[int, ...], segment: int, dtype: torch.dtype, masked: bool, filled: bool,
    update: str,
) -> None:  # fmt: skip
    batch, heads, _, tokens, _, values = shape
    mask = draw(batch, tokens, seed=6) > -0.3 if masked else None
    if mask is not None:
        mask[-1] = False  # a row of padding alone
    given = inputs(*shape, filled=filled, dtype=dtype)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        found = infini.scan(*leaves, segment, update=update, mask=mask)  # type: ignore[misc]
        assert found[0].shape == (batch, heads, tokens, values)
        assert all(x.dtype == torch.float32 for x in found)
        loss = sum((x * draw(*x.shape, seed=9 + n)).sum() for n, x in enumerate(found))
        loss.backward()  # type: ignore[union-attr]
        grads = [torch.zeros(1) if x.grad is None else x.grad.float() for x in leaves]
        return [*(x.detach() for x in found), *grads]

    naive, chunked = both(run)
    for got, want in zip(chunked, naive, strict=True):
        assert bool(got.isfinite().all())
        # Gradients of bfloat16 inputs are rounded to 8 bits in both.
        assert relative(got, want) < (2e-5 if dtype == torch.float32 else 1e-2)
    if not filled and segment >= tokens:
        assert float(naive[0].abs().max()) == 0.0  # an empty memory gives nothing
    if mask is not None and not filled:
        assert float(naive[1][-1].abs().max()) == 0.0  # padding writes nothing
        assert float(chunked[0][-1].abs().max()) == 0.0


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), own=st.integers(1, 2), group=st.integers(1, 3),
    tokens=st.integers(0, 9), keys=st.integers(1, 6), values=st.integers(1, 6),
    segment=st.integers(1, 10), update=st.sampled_from(infini.UPDATES),
)  # fmt: skip
def test_any_sizes(
    batch: int, own: int, group: int, tokens: int, keys: int, values: int, segment: int, update: str
) -> None:
    given = inputs(batch, own * group, own, tokens, keys, values, dtype=DOUBLE)
    naive, chunked = both(lambda: infini.scan(*given, segment, update=update))  # type: ignore[misc]
    for got, want in zip(chunked, naive, strict=True):
        assert got.shape == want.shape and relative(got, want) < 1e-10


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("update", infini.UPDATES)
@pytest.mark.parametrize("filled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradcheck(name: str, update: str, filled: bool) -> None:
    """Through reads, writes, the first memory and the last; over three segments, the last short."""
    leaves = [x.requires_grad_() for x in inputs(2, 2, 1, 5, 2, 2, filled=True, dtype=DOUBLE)]
    mask = torch.tensor([[True, True, False, True, True], [False] * 5])
    if not filled:  # an empty memory is a kink: its own gradients are not differences
        leaves[3:] = [torch.zeros_like(x).detach() for x in leaves[3:]]

    def scan(*x: Tensor) -> Any:
        return infini.scan(*x, 2, update=update, mask=mask)  # type: ignore[misc]

    with backend(name):
        assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("update", infini.UPDATES)
def test_a_scan_is_reads_and_writes(name: str, update: str) -> None:
    q, k, v, M, z = inputs(2, 4, 2, 7, 3, 5)
    with backend(name):
        out, last_M, last_z = infini.scan(q, k, v, M, z, 3, update=update)
        for start in (0, 3, 6):
            part = slice(start, start + 3)
            want = infini.read(q[:, :, part], M, z)
            assert relative(out[:, :, part], want) < 1e-5
            M, z = infini.write(k[:, :, part], v[:, :, part], M, z, update=update)
    assert relative(last_M, M) < 1e-5 and relative(last_z, z) < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_query_heads_read_their_own_memory(name: str) -> None:
    """Head h reads memory h // G, in the order 0 0 1 1."""
    q, _, _, M, z = inputs(1, 4, 2, 3, 2, 2)
    with backend(name):
        got = infini.read(q, M, z)
        for h in range(4):
            own = slice(h // 2, h // 2 + 1)
            assert torch.allclose(
                got[:, h : h + 1], infini.read(q[:, h : h + 1], M[:, own], z[:, own])
            )


@pytest.mark.parametrize("name", BACKENDS)
def test_one_constant_value_is_read_back(name: str) -> None:
    """The linear read is an average of all values; delta halves a value written again."""
    k, q = draw(1, 1, 6, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    v, M, z = torch.full((1, 1, 6, 2), 3.0), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4)
    with backend(name):
        for _ in range(3):
            M, z = infini.write(k, v, M, z)
            assert relative(infini.read(q, M, z), torch.full((1, 1, 3, 2), 3.0)) < 1e-6
        M, z = infini.write(k, v, torch.zeros_like(M), torch.zeros_like(z), update="delta")
        M, z = infini.write(k, v, M, z, update="delta")
        assert relative(infini.read(q, M, z), torch.full((1, 1, 3, 2), 1.5)) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("update", infini.UPDATES)
def test_masked_tokens_do_not_exist(name: str, update: str) -> None:
    """A write with a mask is the write of the real tokens; what is masked may be NaN."""
    _, k, v, M, z = inputs(1, 1, 1, 6, 3, 2)
    mask = torch.tensor([[True, False, True, True, False, False]])
    spoilt = [x.masked_fill(~mask[:, None, :, None], torch.nan).requires_grad_() for x in (k, v)]
    with backend(name):
        want = infini.write(k[:, :, mask[0]], v[:, :, mask[0]], M, z, update=update)
        got = infini.write(*spoilt, M, z, update=update, mask=mask)
    assert relative(got[0], want[0]) < 1e-6 and relative(got[1], want[1]) < 1e-6
    (got[0].sum() + got[1].sum()).backward()
    for x in spoilt:
        assert bool(x.grad.isfinite().all())  # type: ignore[union-attr]
        assert float(x.grad[:, :, ~mask[0]].abs().max()) == 0.0  # type: ignore[index]


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_written_in_place(name: str) -> None:
    given = inputs(2, 2, 2, 5, 3, 4)
    before = [x.clone() for x in given]
    with backend(name):
        infini.scan(*given, 2, update="delta")  # type: ignore[misc]
        M, z = infini.write(*given[1:], update="delta")  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert M.data_ptr() != given[3].data_ptr() and z.data_ptr() != given[4].data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("update", infini.UPDATES)
def test_numbers_stay_finite_over_many_segments(name: str, update: str) -> None:
    """bfloat16 inputs of any size, constant ones and zeros: sums are in float32."""
    length = 40 if name == "naive" else 4000
    for value in (None, 0.0, 30.0, -30.0):
        q, k, v, M, z = inputs(1, 1, 1, length, 3, 2, filled=False, dtype=torch.bfloat16)
        if value is not None:
            q, k, v = (torch.full_like(x, value) for x in (q, k, v))
        q.requires_grad_()
        k.requires_grad_()
        with backend(name):
            out, M, z = infini.scan(q, k, v, M, z, 4, update=update)
        (out.sum() + M.sum()).backward()
        for x in (out, M, z, q.grad, k.grad):
            assert bool(x.isfinite().all())  # type: ignore[union-attr]


def test_wrong_input_is_explained() -> None:
    q, k, v, M, z = inputs(2, 4, 2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"'rule'.*linear, delta"):
        infini.write(k, v, M, z, update="rule")
    with pytest.raises(ValueError, match="at least 1"):
        infini.scan(q, k, v, M, z, 0)
    with pytest.raises(ValueError, match="a multiple of 2"):
        infini.read(q[:, :3], M, z)
    with pytest.raises(ValueError, match="must be"):
        infini.read(q, M, z[:, :1])
    with pytest.raises(ValueError, match="k is"):
        infini.write(k[:, :1], v, M, z)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        infini.write(k, v, M, z, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="q has 4 tokens"):
        infini.scan(q[:, :, :4], k, v, M, z, 2)


@pytest.mark.slow
@pytest.mark.parametrize("update", infini.UPDATES)
def test_compiled_whole(update: str) -> None:
    """The fast torch way in one graph, forward and backward."""
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        leaves = [x.requires_grad_() for x in inputs(1, 4, 2, 10, 3, 3, dtype=DOUBLE)]

        def run(*x: Tensor) -> Any:
            return infini.scan(*x, 4, update=update)  # type: ignore[misc]

        with backend("torch"):
            whole = torch.compile(run, fullgraph=True, backend="aot_eager")
            outs = (whole if compiled else run)(*leaves)
            sum((x * x).sum() for x in outs).backward()
        found.append([*outs, *(x.grad for x in leaves)])
    for got, want in zip(found[1], found[0], strict=True):
        assert relative(got, want) < 1e-12
