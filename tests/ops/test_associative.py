"""The associative memory: naive and chunked agree, gradients are right, edges hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memwrap.ops import associative, backend, current_backend

BACKENDS = ("naive", "torch")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def memory(
    batch: int, heads: int, nu: int, d: int, values: int, *, filled: str = "full",
    denominator: bool = True, dtype: torch.dtype = torch.float32, normalize: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """State and inputs of a write. `filled`: "empty", "full" or "mixed" rows."""
    features = 2 * nu * d
    A = draw(batch, heads, features, values, seed=1, dtype=dtype)
    z = draw(batch, heads, features, seed=2, dtype=dtype).abs()
    written = torch.ones(batch, dtype=torch.bool)
    if filled != "full":
        rows = slice(None) if filled == "empty" else slice(0, None, 2)
        A[rows], z[rows], written[rows] = 0.0, 0.0, False
    return {"A": A, "z": z if denominator else None, "written": written}


def relative(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))


# DPFP


@pytest.mark.parametrize("nu", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 3, 8])
def test_dpfp_is_its_definition(nu: int, d: int) -> None:
    x = draw(2, 5, d, dtype=torch.float64)
    got = associative.dpfp(x, nu)
    assert got.shape == (2, 5, 2 * nu * d)
    for b in range(2):
        for t in range(5):
            u = [max(float(v), 0.0) for v in x[b, t]] + [max(-float(v), 0.0) for v in x[b, t]]
            want = [u[i] * u[(i - j) % len(u)] for j in range(1, nu + 1) for i in range(len(u))]
            assert torch.allclose(got[b, t], torch.tensor(want, dtype=torch.float64), atol=1e-15)
    assert bool((got >= 0).all())
    assert torch.autograd.gradcheck(lambda v: associative.dpfp(v, nu), draw(
        2, d, dtype=torch.float64
    ).requires_grad_())  # fmt: skip


def test_features_are_kept_in_the_accumulation_dtype() -> None:
    x = draw(2, 3, 4)
    for dtype, want in (
        (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
        (torch.float32, torch.float32), (torch.float64, torch.float64),
    ):  # fmt: skip
        plain = associative.features(x.to(dtype), 3, False)
        assert plain.dtype == want
        normed = associative.features(x.to(dtype), 3, True)
        lengths = normed.norm(dim=-1)
        assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)
    assert bool(associative.features(torch.zeros(1, 4), 3, True).isfinite().all())


# Agreement


def both(function: Any) -> tuple[Any, Any]:
    results = []
    for name in BACKENDS:
        with backend(name):
            results.append(function())
    return results[0], results[1]


@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize("filled", ["empty", "full", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 2, 5, 3), (1, 3, 7, 1)])
def test_reads_agree(
    shape: tuple[int, int, int, int], dtype: torch.dtype, filled: str, denominator: bool
) -> None:
    batch, heads, tokens, values = shape
    state = memory(batch, heads, 3, 4, values, filled=filled, denominator=denominator)
    x = draw(batch, heads, tokens, 4, seed=5, dtype=dtype)
    weights = draw(batch, heads, tokens, values, seed=9)

    def run() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), state["A"].clone().requires_grad_()]
        if denominator:
            leaves.append(state["z"].clone().requires_grad_())
        q = associative.features(leaves[0], 3, False)
        out = associative.read(q, leaves[1], leaves[2] if denominator else None)
        assert out.shape == (batch, heads, tokens, values) and out.dtype == torch.float32
        (out * weights).sum().backward()
        return (out.detach(), *[leaf.grad.float() for leaf in leaves])

    naive, chunked = both(run)
    for got, want in zip(chunked, naive, strict=True):
        assert relative(got, want) < (1e-4 if dtype == torch.float32 else 1e-2)
    if filled == "empty":
        assert float(naive[0].abs().max()) == 0.0  # an empty memory gives nothing


@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize("filled", ["empty", "full", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 2, 5, 3), (1, 3, 7, 1)])
@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize("correction", [False, True])
def test_writes_agree(
    shape: tuple[int, int, int, int], dtype: torch.dtype, filled: str, denominator: bool,
    gating: bool, correction: bool,
) -> None:  # fmt: skip
    batch, heads, tokens, values = shape
    normalize = not denominator
    state = memory(batch, heads, 3, 4, values, filled=filled, denominator=denominator)
    x = draw(batch, heads, tokens, 4, seed=5, dtype=dtype)
    v = draw(batch, heads, tokens, values, seed=6, dtype=dtype)
    b = draw(batch, heads, tokens, values if gating else 1, seed=7, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, v, b, state["A"])]
        if denominator:
            leaves.append(state["z"].clone().requires_grad_())
        k = associative.features(leaves[0], 3, normalize)
        A, z = associative.write(
            k, leaves[1].float(), torch.sigmoid(leaves[2].float()), leaves[3],
            leaves[4] if denominator else None, state["written"], correction=correction,
            key_eps=0.0 if normalize else associative.EPS,
        )  # fmt: skip
        assert A.dtype == torch.float32 and (z is None) == (not denominator)
        out = (A * draw(*A.shape, seed=8)).sum()
        if z is not None:
            out = out + (z * draw(*z.shape, seed=8)).sum()
        out.backward()
        results = [A, *([] if z is None else [z]), *[leaf.grad for leaf in leaves]]
        return tuple(torch.zeros(1) if r is None else r.detach().float() for r in results)

    naive, chunked = both(run)
    for got, want in zip(chunked, naive, strict=True):
        assert bool(got.isfinite().all())
        assert relative(got, want) < (1e-4 if dtype == torch.float32 else 2e-2)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), tokens=st.integers(1, 9),
    d=st.integers(1, 7), nu=st.integers(1, 3), values=st.integers(1, 6),
    segments=st.integers(1, 4), normalize=st.booleans(), correction=st.booleans(),
)  # fmt: skip
def test_any_sizes_over_segments(
    batch: int, heads: int, tokens: int, d: int, nu: int, values: int, segments: int,
    normalize: bool, correction: bool,
) -> None:  # fmt: skip
    def run() -> tuple[Tensor, Tensor, Tensor]:
        shape = (batch, heads, 2 * nu * d, values)
        A, z = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:3], dtype=torch.float64)
        written = torch.zeros(batch, dtype=torch.bool)
        q = associative.features(
            draw(batch, heads, tokens, d, seed=99, dtype=torch.float64), nu, normalize
        )
        for s in range(segments):
            x = draw(batch, heads, tokens, d, seed=s, dtype=torch.float64)
            k = associative.features(x, nu, normalize)
            v = draw(batch, heads, tokens, values, seed=50 + s, dtype=torch.float64)
            beta = torch.sigmoid(draw(batch, heads, tokens, 1, seed=70 + s, dtype=torch.float64))
            A, new_z = associative.write(
                k, v, beta, A, z, written, correction=correction,
                key_eps=0.0 if normalize else associative.EPS,
            )  # fmt: skip
            assert new_z is not None
            z, written = new_z, torch.ones_like(written)
        return A, z, associative.read(q, A, z)

    naive, chunked = both(run)
    for got, want in zip(chunked, naive, strict=True):
        assert bool(want.isfinite().all()) and relative(got, want) < 1e-7


@pytest.mark.parametrize("name", BACKENDS)
def test_sums_are_kept_whatever_the_inputs_dtype(name: str) -> None:
    """bfloat16 keys, values and strengths go into a float32 memory, which stays float32."""
    state = memory(2, 1, 3, 4, 5)
    k = associative.features(draw(2, 1, 3, 4), 3, False).bfloat16()
    v, beta = draw(2, 1, 3, 5, seed=3).bfloat16(), torch.full((2, 1, 3, 1), 0.5).bfloat16()
    with backend(name):
        A, z = associative.write(k, v, beta, **state)
        out = associative.read(k, A, z)
    assert A.dtype == torch.float32 and z is not None and z.dtype == torch.float32
    assert bool(out.isfinite().all())
    want, _ = associative.write(k.float(), v.float(), beta.float(), **state)
    assert relative(A, want) < 1e-2


# Gradients


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("denominator", [True, False])
def test_gradcheck(name: str, denominator: bool) -> None:
    double = torch.float64
    state = memory(2, 2, 1, 2, 3, filled="mixed", denominator=denominator, dtype=double)
    x, v = draw(2, 2, 3, 2, seed=5, dtype=double), draw(2, 2, 3, 3, seed=6, dtype=double)
    beta = torch.sigmoid(draw(2, 2, 3, 1, seed=7, dtype=double))
    k = associative.features(x, 1, not denominator)
    if denominator:
        state["z"] = state["z"] + 0.5  # away from the pole: central differences need room

    def write(k: Tensor, v: Tensor, beta: Tensor, A: Tensor, *z: Tensor) -> Any:
        out = associative.write(
            k, v, beta, A, z[0] if z else None, state["written"], correction=False
        )
        return out if z else out[0]

    leaves = [k, v, beta, state["A"], *([state["z"]] if denominator else [])]
    leaves = [t.clone().requires_grad_() for t in leaves]
    with backend(name):
        assert torch.autograd.gradcheck(write, leaves)
        reads = [leaves[0], leaves[3], leaves[4] if denominator else None]
        assert torch.autograd.gradcheck(associative.read, reads)


@pytest.mark.parametrize("name", BACKENDS)
def test_gamma_is_a_constant_for_gradients(name: str) -> None:
    """z = z + gamma k: its gradient to k is gamma, as if gamma were a number."""
    state = memory(1, 1, 1, 2, 3, dtype=torch.float64)
    state["z"] = state["z"] * 0.05  # a key that is new in part: 0 < gamma < 1
    k = associative.features(draw(1, 1, 1, 2, seed=5, dtype=torch.float64), 1, False)
    k = (k + 0.1).requires_grad_()
    v, beta = torch.ones(1, 1, 1, 3).double(), torch.full((1, 1, 1, 1), 0.5).double()
    with backend(name):
        _, z = associative.write(k, v, beta, **state)
    z.sum().backward()  # type: ignore[union-attr]
    squared = float((k.detach() ** 2).sum()) + associative.EPS
    want = 1 - (float((k.detach()[0, 0, 0] * state["z"][0, 0]).sum()) + associative.EPS) / squared
    assert 0 < want < 1
    assert torch.allclose(k.grad, torch.full_like(k, want), rtol=1e-9)  # type: ignore[arg-type]


# What it is for


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_what_was_written_is_read(name: str, normalize: bool) -> None:
    """Orthogonal keys, full strength: every value comes back; a rewritten one is replaced."""
    k = torch.eye(6)[None, None] * (1.0 if normalize else 3.0)
    z = torch.zeros(1, 1, 6)
    A, beta = torch.zeros(1, 1, 6, 4), torch.ones(1, 1, 6, 1)
    first, second = draw(1, 1, 6, 4, seed=1), draw(1, 1, 6, 4, seed=2)
    nothing = torch.zeros(1, dtype=torch.bool)
    with backend(name):
        A, z = associative.write(k, first, beta, A, z, nothing)  # type: ignore[assignment]
        assert relative(associative.read(k, A, z), first) < 1e-4
        A, z = associative.write(k, second, beta, A, z, ~nothing)  # type: ignore[assignment]
        assert relative(associative.read(k, A, z), second) < 1e-4
        # The correction: a key that is there already adds nothing to the normaliser.
        assert relative(z, k.sum(-2)) < 1e-4
        uncorrected = associative.write(k, second, beta, A, z, ~nothing, correction=False)[1]
        assert relative(uncorrected, 2 * k.sum(-2)) < 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BACKENDS)
def test_the_first_write_is_known_by_its_flag(name: str) -> None:
    """With tiny keys the general formula would give gamma near 0 for an empty memory."""
    k = torch.full((2, 1, 1, 4), 1e-4)
    A, z = torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4)
    written = torch.tensor([False, True])
    with backend(name):
        _, new_z = associative.write(
            k, torch.ones(2, 1, 1, 3), torch.ones(2, 1, 1, 1), A, z, written
        )
    assert new_z is not None
    assert torch.allclose(new_z[0], k[0, :, 0])
    assert float(new_z[1].abs().max()) < 0.1 * float(k.max())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_keys_without_features(name: str, normalize: bool, written: bool) -> None:
    """One coordinate and nu=1 can give features that are all zero: no NaN, nothing stored."""
    state = memory(1, 1, 1, 2, 3, filled="full")
    state["written"] = torch.tensor([written])
    k = torch.zeros(1, 1, 2, 4, requires_grad=True)
    with backend(name):
        A, z = associative.write(
            k, torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 1), **state,
            key_eps=0.0 if normalize else associative.EPS,
        )  # fmt: skip
        out = associative.read(k, A, z)
    assert torch.equal(A, state["A"]) and torch.equal(z, state["z"])  # type: ignore[arg-type]
    assert float(out.detach().abs().max()) == 0.0
    (A.sum() + z.sum() + out.sum()).backward()  # type: ignore[union-attr]
    assert bool(k.grad.isfinite().all())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_written_in_place(name: str) -> None:
    state = memory(2, 2, 3, 4, 5, filled="mixed")
    k = associative.features(draw(2, 2, 3, 4), 3, False)
    v, beta = draw(2, 2, 3, 5, seed=3), torch.full((2, 2, 3, 1), 0.5)
    given = [k, v, beta, state["A"], state["z"], state["written"]]
    before = [t.clone() for t in given]
    with backend(name):
        A, z = associative.write(k, v, beta, **state)
        associative.read(k, A, z)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert A.data_ptr() != state["A"].data_ptr()


@pytest.mark.parametrize("name", BACKENDS)
def test_no_queries_and_no_tokens(name: str) -> None:
    state = memory(2, 1, 1, 2, 3)
    empty = torch.zeros(2, 1, 0, 4)
    with backend(name):
        assert associative.read(empty, state["A"], state["z"]).shape == (2, 1, 0, 3)
        A, z = associative.write(empty, empty[..., :3], empty[..., :1], **state)
    assert torch.equal(A, state["A"]) and torch.equal(z, state["z"])  # type: ignore[arg-type]


def test_choosing_the_implementation() -> None:
    assert current_backend() == "torch"
    with backend("naive"):
        assert current_backend() == "naive"
        with backend("torch"):
            assert current_backend() == "torch"
        assert current_backend() == "naive"
    assert current_backend() == "torch"
    with pytest.raises(RuntimeError), backend("naive"):
        raise RuntimeError
    assert current_backend() == "torch"
    with pytest.raises(ValueError, match=r"cuda.*naive"), backend("cuda"):
        pass
