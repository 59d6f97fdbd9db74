"""Gated linear attention, the delta rule and gated slots: naive and chunked agree, edges hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memwrap.ops import backend, delta, gla
from memwrap.ops.delta import unit
from memwrap.ops.gla import chunked, gsa
from memwrap.ops.gla.features import FEATURE_MAPS, feature_width, features

BACKENDS = ("naive", "torch")
DOUBLE = torch.float64
KINDS = (
    "none", "scalar", "vector", "delta", "delta channels", "gated delta", "key gated delta",
    "erasing delta", "slots",
)  # fmt: skip
Scan = Callable[..., tuple[Tensor, ...]]


def draw(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def problem(
    kind: str, batch: int, own: int, group: int, tokens: int, keys: int, values: int, *,
    strength: float = 1.0, dtype: torch.dtype = DOUBLE,
) -> tuple[Scan, list[Tensor]]:  # fmt: skip
    """A function of its tensors that returns the output and the last state, and the tensors."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = (batch, own, tokens)
    q = draw(batch, own * group, tokens, keys, seed=1, dtype=dtype)
    k, v = draw(*rows, keys, seed=2, dtype=dtype), draw(*rows, values, seed=3, dtype=dtype)
    S = draw(batch, own, keys, values, seed=4, dtype=wide)

    def gate(*shape: int, seed: int = 5) -> Tensor:
        return F.logsigmoid(draw(*shape, seed=seed)).to(wide) * strength

    def strengths(*shape: int) -> Tensor:
        return draw(*shape, seed=6).sigmoid().to(wide)

    if kind == "slots":
        slots = 3
        states = [draw(batch, own, keys, slots, seed=4, dtype=wide),
                  draw(batch, own, slots, values, seed=7, dtype=wide)]  # fmt: skip
        given = [q, k, v, strengths(*rows, slots), gate(*rows, slots), *states]

        def run(q: Any, k: Any, v: Any, s: Any, g: Any, K: Any, V: Any, **kw: Any) -> Any:
            out, state = gsa.scan(q, k, v, s, g, (K, V), **kw)
            return (out, *state)

        return run, given
    if "delta" in kind:
        beta = strengths(*rows, values) if kind == "delta channels" else strengths(*rows)
        given = [q, k, v, beta, S]
        if kind == "erasing delta":
            given[3] = strengths(*rows, values)
            return (
                lambda q, k, v, w, S, g, b, **kw: delta.scan(
                    q, k, v, w, g, S, erase=b, l2norm=True, **kw
                ),
                [*given, gate(*rows, keys), draw(*rows, keys, seed=8).sigmoid().to(wide)],
            )
        if "gated" in kind:
            return (
                lambda q, k, v, b, S, g, **kw: delta.scan(q, k, v, b, g, S, l2norm=True, **kw),
                [*given, gate(*rows, keys) if "key" in kind else gate(*rows)],
            )
        return lambda q, k, v, b, S, **kw: delta.scan(q, k, v, b, None, S, l2norm=True, **kw), given
    given = [q, k, v, S]
    if kind == "none":
        return lambda q, k, v, S, **kw: gla.scan(q, k, v, None, S, **kw), given
    g = gate(*rows) if kind == "scalar" else gate(*rows, keys)
    return lambda q, k, v, S, g, **kw: gla.scan(q, k, v, g, S, **kw), [*given, g]


def results(scan: Scan, given: list[Tensor], name: str, **keywords: Any) -> list[Tensor]:
    """Outputs, last states and the gradients of everything."""
    leaves = [x.clone().requires_grad_() for x in given]
    with backend(name):
        found = scan(*leaves, **keywords)
        parts = [(x * draw(*x.shape, seed=9 + n).to(x.dtype)).sum() for n, x in enumerate(found)]
        torch.stack([p.double() for p in parts]).sum().backward()
    return [*(x.detach() for x in found), *(x.grad for x in leaves)]  # type: ignore[misc]


def relative(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    # Inputs are of size 1; what cancels to 0 is compared on that scale.
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(0.05))


STRENGTHS = (0.05, 1.0, 2.0, 60.0)
# All pairs of two of them; those of all three are slow.
EDGES = [
    pytest.param(
        kind, strength, tokens, id=f"{tokens}-{strength}-{kind}",
        marks=() if (first + third) % len(STRENGTHS) == second else pytest.mark.slow,
    )
    for first, kind in enumerate(KINDS)
    for second, strength in enumerate(STRENGTHS)
    for third, tokens in enumerate((1, 2, 37, 64, 129, 520))
]  # fmt: skip


@pytest.mark.parametrize(("kind", "strength", "tokens"), EDGES)
def test_chunked_is_naive(kind: str, strength: float, tokens: int) -> None:
    """Weak gates, strong ones that leave nothing of the past, one chunk, several blocks."""
    scan, given = problem(kind, 2, 2, 2, tokens, 6, 5, strength=strength)
    naive, chunked = (results(scan, given, name) for name in BACKENDS)
    for got, want in zip(chunked, naive, strict=True):
        assert got.shape == want.shape and relative(got, want) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_reading_is_training(kind: str) -> None:
    """Without gradients, the outputs of several blocks are written into one place."""
    scan, given = problem(kind, 2, 2, 2, 1100, 6, 5)
    with backend("torch"):
        want = scan(*given)
        with torch.no_grad():
            got = scan(*given)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole(kind: str) -> None:
    """The fast torch way in one graph, forward and backward, weak gates taken for strong ones."""
    torch._dynamo.reset()
    scan, given = problem(kind, 1, 1, 2, 9, 3, 3)
    want = results(scan, given, "torch")
    whole = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for got, eager in zip(results(whole, given, "torch"), want, strict=True):
        assert relative(got, eager) < 1e-12


@pytest.mark.parametrize(
    "gate, length, strong",
    [(0.9, 64, False), (1.8, 32, False), (3.7, 16, False), (3.8, 64, True), (1e4, 64, True)],
)
def test_chunks_are_as_long_as_their_gates_allow(gate: float, length: int, strong: bool) -> None:
    """Factors stay within 2 ** 60: 64 tokens with gates of 0.9, 32 of 1.8, 16 of 3.7."""
    logs = torch.full((1, 2, 3, 64, 4), -gate)
    assert chunked.allowed_length(logs) == (length, strong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.05, 1.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_float32_and_bfloat16(kind: str, strength: float, dtype: torch.dtype) -> None:
    scan, given = problem(kind, 1, 2, 1, 150, 8, 8, strength=strength, dtype=dtype)
    wide = results(scan, [x.double() for x in given], "naive")
    got = results(scan, given, "torch")
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    for a, b in zip(got, wide, strict=True):
        assert bool(a.isfinite().all())
        # bfloat16: outputs and gradients are rounded to 8 bits, sums are not.
        assert relative(a, b) < (2e-5 if dtype == torch.float32 else 2e-2)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS), batch=st.integers(1, 2), own=st.integers(1, 2),
    group=st.integers(1, 3), tokens=st.integers(0, 9), keys=st.integers(1, 5),
    values=st.integers(1, 5),
)  # fmt: skip
def test_any_sizes(
    kind: str, batch: int, own: int, group: int, tokens: int, keys: int, values: int
) -> None:
    scan, given = problem(kind, batch, own, group, tokens, keys, values)
    found = []
    for name in BACKENDS:
        with backend(name):
            found.append(scan(*given))
    for got, want in zip(found[1], found[0], strict=True):
        assert got.shape == want.shape and relative(got, want) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(kind: str, name: str) -> None:
    scan, given = problem(kind, 1, 1, 2, 5, 2, 2)
    with backend(name):
        leaves = [x.requires_grad_() for x in given]
        assert torch.autograd.gradcheck(lambda *x: scan(*x), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_in_pieces(kind: str, name: str) -> None:
    """A state goes on where it was."""
    scan, given = problem(kind, 2, 2, 1, 23, 4, 3)
    states = 2 if kind == "slots" else 1
    first = next(i for i, x in enumerate(given) if x.shape[2] != 23)
    with backend(name):
        want = scan(*given)
        outs, state = [], given[first : first + states]
        for start in range(0, 23, 7):
            part = [x[:, :, start : start + 7] for x in given]
            part[first : first + states] = state
            out, *state = scan(*part)
            outs.append(out)
    for got, whole in zip([torch.cat(outs, 2), *state], want, strict=True):
        assert relative(got, whole) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_masked_tokens_do_not_exist(kind: str, name: str) -> None:
    """What is masked may be NaN, forward and backward."""
    scan, given = problem(kind, 1, 2, 1, 6, 3, 2)
    mask = torch.tensor([[True, False, True, True, False, False]])
    here = [x[:, :, mask[0]] if x.shape[2] == 6 else x for x in given]
    spoilt = []
    for x in given:
        hidden = (~mask[:, None]).view(1, 1, 6, *[1] * (x.dim() - 3)) if x.shape[2] == 6 else None
        spoilt.append(x if hidden is None else x.masked_fill(hidden, torch.nan))
    leaves = [x.clone().requires_grad_() for x in spoilt]
    with backend(name):
        want, got = scan(*here), scan(*leaves, mask=mask)
    assert relative(got[0][:, :, mask[0]].detach(), want[0]) < 1e-12
    for a, b in zip(got[1:], want[1:], strict=True):
        assert relative(a.detach(), b) < 1e-12
    sum(x.sum() for x in (got[0][:, :, mask[0]], *got[1:])).backward()  # type: ignore[union-attr]
    assert all(bool(x.grad.isfinite().all()) for x in leaves)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BACKENDS)
def test_joined_sequences_are_independent(name: str) -> None:
    q, k, v = (draw(1, 2, 11, 3, seed=s) for s in (1, 2, 3))
    g, beta = F.logsigmoid(draw(1, 2, 11, seed=5)), draw(1, 2, 11, seed=6).sigmoid()
    S, cu = draw(3, 2, 3, 3, seed=4), torch.tensor([0, 4, 4, 11])
    with backend(name):
        out, last = gla.scan(q, k, v, g, S, cu_seqlens=cu)
        other, other_last = delta.scan(q, k, v, beta, g, S, cu_seqlens=cu)
        for n, (a, b) in enumerate(((0, 4), (4, 4), (4, 11))):
            part = [x[:, :, a:b] for x in (q, k, v, g)]
            want = gla.scan(*part, S[n : n + 1])
            assert torch.equal(out[:, :, a:b], want[0]) and torch.equal(last[n : n + 1], want[1])
            want = delta.scan(*part[:3], beta[:, :, a:b], part[3], S[n : n + 1])
            assert torch.equal(other[:, :, a:b], want[0])
            assert torch.equal(other_last[n : n + 1], want[1])


def test_special_cases_meet() -> None:
    """No gate is a gate of 0, a gate a head is a gate of all its channels."""
    q, k, v = (draw(1, 1, 20, 4, seed=s) for s in (1, 2, 3))
    g = F.logsigmoid(draw(1, 1, 20, seed=5))
    plain, zero = gla.scan(q, k, v), gla.scan(q, k, v, torch.zeros_like(g))
    wide, scalar = gla.scan(q, k, v, g[..., None].expand_as(k)), gla.scan(q, k, v, g)
    for got, want in ((zero, plain), (wide, scalar)):
        assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))
    # Linear attention without a gate is a sum over all pairs.
    scores = (q @ k.transpose(-1, -2) * 4**-0.5).tril()
    assert relative(plain[0], scores @ v) < 1e-12


def test_special_cases_of_the_delta_rule_meet() -> None:
    """A gate of all key channels is one of the head, no gate one of 0, and what is erased with the
    strength of the write is the plain rule: every pair comes from different code."""
    q, k, v = (draw(1, 2, 37, 4, seed=s) for s in (1, 2, 3))
    g, beta = F.logsigmoid(draw(1, 2, 37, seed=5)), draw(1, 2, 37, seed=6).sigmoid()
    wide, both = (x[..., None].expand_as(k).contiguous() for x in (g, beta))
    for gate in (None, g):
        want = delta.scan(q, k, v, beta, gate, l2norm=True)
        by_key = torch.zeros_like(k) if gate is None else wide
        for got in (
            delta.scan(q, k, v, beta, by_key, l2norm=True),
            delta.scan(q, k, v, beta, gate, erase=both, l2norm=True),
            delta.scan(q, k, v, both, by_key, erase=both, l2norm=True),
            delta.scan(q, k, v, both, by_key, l2norm=True),
        ):
            assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


def test_the_delta_rule_replaces_a_value() -> None:
    """With beta 1 and unit keys a key read again gives its last value, whatever was there."""
    k = unit(draw(1, 1, 1, 4, seed=1)).expand(-1, -1, 3, -1)
    v = draw(1, 1, 3, 4, seed=2)
    out, _ = delta.scan(k, k, v, torch.ones(1, 1, 3, dtype=DOUBLE), scale=1.0)
    assert relative(out, v) < 1e-5  # unit vectors are 1e-6 short


def test_nothing_is_written_in_place() -> None:
    for kind in KINDS:
        scan, given = problem(kind, 1, 1, 1, 9, 2, 2)
        before = [x.clone() for x in given]
        found = scan(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        assert all(x.data_ptr() != y.data_ptr() for x in found for y in given)


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_feature_maps(kind: str) -> None:
    x, y = draw(2, 5, 6, seed=1), draw(2, 5, 6, seed=2)
    a, b = features(x, kind), features(y, kind)
    assert a.shape[-1] == feature_width(kind, 6)
    product = (x * y).sum(-1) / 6**0.5
    if kind == "taylor":
        assert relative((a * b).sum(-1), 1 + product + product**2 / 2) < 1e-12
    elif kind != "none":
        assert float((a * b).sum(-1).min()) > 0
    if kind in ("softmax", "hedgehog"):
        assert relative(a.sum(-1), torch.full((2, 5), 1.0 + (kind == "hedgehog"))) < 1e-12
    assert features(x.bfloat16(), kind).dtype == torch.float32
    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: features(z, kind), [leaf])


def test_wrong_input_is_explained() -> None:
    q, k, v = (draw(2, h, 5, 4, seed=1) for h in (4, 2, 2))
    S, beta = torch.zeros(2, 2, 4, 4, dtype=DOUBLE), torch.ones(2, 2, 5, dtype=DOUBLE)
    with pytest.raises(ValueError, match="a multiple of 2"):
        gla.scan(q[:, :3], k, v)
    with pytest.raises(ValueError, match=r"k is .* and v is"):
        gla.scan(q, k, v[:, :, :3])
    with pytest.raises(ValueError, match="g is"):
        gla.scan(q, k, v, torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match=r"state is .*float32"):
        gla.scan(q, k, v, state=S.float())
    with pytest.raises(ValueError, match=r"torch\.bool"):
        gla.scan(q, k, v, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="of one"):
        gla.scan(q.float(), k, v)
    with pytest.raises(ValueError, match="one row"):
        gla.scan(q, k, v, cu_seqlens=torch.tensor([0, 5]))
    one = [x[:1] for x in (q, k, v)]
    with pytest.raises(ValueError, match="rise from 0 to 5"):
        gla.scan(*one, cu_seqlens=torch.tensor([0, 6]))  # type: ignore[misc]
    with pytest.raises(ValueError, match="N \\+ 1"):
        gla.scan(*one, cu_seqlens=torch.tensor([0]))  # type: ignore[misc]
    with pytest.raises(ValueError, match="beta is"):
        delta.scan(q, k, v, beta[..., :3])
    with pytest.raises(ValueError, match="g is"):
        delta.scan(q, k, v, beta, torch.zeros(2, 2, 5, 3))
    with pytest.raises(ValueError, match="erase is"):
        delta.scan(q, k, v, beta, erase=beta)
    with pytest.raises(ValueError, match="s is"):
        gsa.scan(q, k, v, beta, beta)
