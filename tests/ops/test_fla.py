"""flash-linear-attention as a backend: the choice, the layout, and the numbers that were recorded.

A stand-in with its signatures computes what its functions are documented to, so that none of this
needs it installed. `benchmarks/fla_agreement.py` runs the real one, and its results are held here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.ops import backend, current_backend, delta, fla, gla, infini
from memwrap.ops.gla import gsa

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "fla_agreement.json"
CALLS: list[str] = []


def _scanned(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, scale: float,
    first: Tensor | None, values: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence, tokens before heads, a token at a time; `values`: decay is of the columns."""
    S = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if first is None else first.float()
    outs = []
    for t in range(q.shape[1]):
        if decay is not None:
            part = decay[:, t].float().exp()
            part = part[..., None, None] if part.dim() == 2 else part[..., None]
            S = S * (part.mT if values else part)
        key, change = k[:, t].float(), v[:, t].float()
        if beta is not None:
            change = beta[:, t, :, None] * (change - (key[..., None] * S).sum(-2))
        S = S + key[..., None] * change[..., None, :]
        outs.append(((scale * q[:, t].float())[..., None] * S).sum(-2))
    empty = q.new_zeros(*q.shape[:3], v.shape[-1])
    return torch.stack(outs, 1) if outs else empty, S


def _sequences(
    q: Tensor, cu_seqlens: Tensor | None, first: Any, one: Callable[[slice, slice], Any]
) -> tuple[Tensor, list[Tensor]]:
    """`one(rows, tokens)` for the batch, or for each joined sequence; as the library it wants long
    bounds, one row for them and a first state of each."""
    if cu_seqlens is None:
        return one(slice(None), slice(None))
    assert cu_seqlens.dtype == torch.long and q.shape[0] == 1
    assert len(first[0]) == len(cu_seqlens) - 1
    bounds = cu_seqlens.tolist()
    pairs = enumerate(pairwise(bounds))
    parts = [one(slice(n, n + 1), slice(a, b)) for n, (a, b) in pairs]
    states = zip(*(ends for _, ends in parts), strict=True)
    return torch.cat([out for out, _ in parts], 1), [torch.cat(x) for x in states]


def recurrence(name: str, gate: str, *, unit: bool = False) -> Callable[..., Any]:
    """A function of the library with one state."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: Tensor,
        output_final_state: bool, cu_seqlens: Tensor | None = None, beta: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False, **gates: Tensor | None,
    ) -> Any:  # fmt: skip
        CALLS.append(name)
        assert output_final_state and initial_state.dtype == torch.float32
        assert q.shape == k.shape and set(gates) <= {gate} and (unit or not use_qk_l2norm_in_kernel)
        g = gates.get(gate)
        if use_qk_l2norm_in_kernel:
            q, k = delta.unit(q), delta.unit(k)

        def one(rows: slice, part: slice) -> Any:
            given = [None if x is None else x[:, part] for x in (q, k, v, g, beta)]
            out, end = _scanned(*given, scale, initial_state[rows])  # type: ignore[arg-type]
            return out, [end]

        out, (end,) = _sequences(q, cu_seqlens, (initial_state,), one)
        return out.to(q.dtype), end

    function.__name__ = name
    return function


def slots(name: str) -> Callable[..., Any]:
    """The library's gated slot attention, for keys with as many heads as queries."""

    def function(
        q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, *, scale: float, initial_state: Any,
        output_final_state: bool, cu_seqlens: Tensor | None = None,
    ) -> Any:  # fmt: skip
        CALLS.append(name)
        assert output_final_state and cu_seqlens is None and s.dtype == q.dtype
        scores, keys = _scanned(q, k, s, g, None, scale, initial_state[0], values=True)
        out, values = _scanned(scores.softmax(-1), s, v, g, None, 1.0, initial_state[1])
        return out.to(q.dtype), [keys, values]

    function.__name__ = name
    return function


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in for the library, and CPU tensors in float32 as what it takes."""
    found = ModuleType("fla")
    found.__version__ = "0.6.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla", found)
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    for name in fla.MODULES:
        module = ModuleType(f"fla.ops.{name}")
        for kind in ("chunk", "fused_recurrent"):
            own = f"{kind}_{name}"
            gate = "gk" if own == "fused_recurrent_gla" else "g"
            made = slots(own) if name == "gsa" else recurrence(own, gate, unit="delta" in name)
            setattr(module, own, made)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fla, "DEVICES", ("cpu",))
    monkeypatch.setattr(fla, "DTYPES", (*fla.DTYPES, torch.float32))
    fla._problem.cache_clear()
    CALLS.clear()
    yield found
    fla._problem.cache_clear()


def drawn(rows: int, tokens: int, states: int, group: int = 2) -> dict[str, Tensor]:
    heads, own = 2, (rows, 2, tokens)
    return {
        "q": torch.randn(rows, heads * group, tokens, 8), "v": torch.randn(*own, 4),
        "k": F.normalize(torch.randn(*own, 8), dim=-1), "beta": torch.rand(own),
        "g": -torch.rand(own), "gk": -torch.rand(*own, 8), "s": torch.rand(*own, 5),
        "gs": -torch.rand(*own, 5), "state": torch.randn(states, heads, 8, 4),
        "keys": torch.randn(states, heads, 8, 5), "values": torch.randn(states, heads, 5, 4),
    }  # fmt: skip


FORMS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "gate a channel": ("gla", "q k v gk state", gla.scan),
    "gate a head": ("simple_gla", "q k v g state", gla.scan),
    "no gate": (
        "simple_gla", "q k v state", lambda q, k, v, s, **o: gla.scan(q, k, v, None, s, **o),
    ),
    "delta": (
        "delta_rule", "q k v beta state",
        lambda q, k, v, b, s, **o: delta.scan(q, k, v, b, None, s, **o),
    ),
    "gated delta": ("gated_delta_rule", "q k v beta g state", delta.scan),
    "slots": (
        "gsa", "q k v s gs keys values",
        lambda q, k, v, s, g, a, b, **o: gsa.scan(q, k, v, s, g, (a, b), **o),
    ),
}  # fmt: skip


def flat(found: Any) -> list[Tensor]:
    out, states = found
    return [out, *(states if isinstance(states, tuple) else (states,))]


@pytest.mark.parametrize(
    ("form", "joined"), [*((x, False) for x in FORMS), *((x, True) for x in FORMS if x != "slots")]
)
def test_it_gives_what_the_ops_give(form: str, joined: bool, library: ModuleType) -> None:
    """Two query heads a state, a scale, a first state, a mask or joined sequences of which one is
    empty; outputs, last states and all gradients, in float32 on both sides."""
    name, names, scan = FORMS[form]
    inputs = drawn(1, 9, 3) if joined else drawn(2, 9, 2)
    options: dict[str, Any] = {"scale": 0.3, "mask": torch.rand(2, 9) > 0.2}
    if joined:
        options = {"scale": 0.3, "cu_seqlens": torch.tensor([0, 4, 4, 9], dtype=torch.int32)}
    if "delta" in form:
        options["l2norm"] = True
        inputs["k"] = 3 * inputs["k"]
    found = {}
    for choice in ("fla", "torch"):
        leaves = [inputs[n].clone().requires_grad_() for n in names.split()]
        with backend(choice):
            outputs = flat(scan(*leaves, **options))
        real = options.get("mask", torch.ones(1, 9, dtype=torch.bool))
        outputs[0] = outputs[0] * real[:, None, :, None]
        sum((o * torch.linspace(0.5, 1, o.numel()).view_as(o)).sum() for o in outputs).backward()  # type: ignore[union-attr]
        found[choice] = [*outputs, *(x.grad for x in leaves)]
    assert [f"chunk_{name}"] == CALLS
    for mine, want in zip(found["fla"], found["torch"], strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_without_gradients_go_one_after_another(form: str, library: ModuleType) -> None:
    name, names, scan = FORMS[form]
    for tokens, kind in ((1, "fused_recurrent"), (fla.RECURRENT + 1, "chunk")):
        inputs = drawn(2, tokens, 2, group=1)
        given = [inputs[n] for n in names.split()]
        CALLS.clear()
        with backend("fla"):
            got = flat(scan(*given))
        assert [f"{kind}_{name}"] == CALLS
        with backend("torch"):
            want = flat(scan(*given))
        for mine, right in zip(got, want, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_states_of_grouped_heads_keep_no_copies(library: ModuleType) -> None:
    inputs = drawn(1, 3, 1)
    with backend("fla"):
        _, state = gla.scan(*(inputs[n] for n in ("q", "k", "v", "g", "state")))
    assert state.untyped_storage().nbytes() == state.numel() * 4


def test_it_is_tried_first(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, where it can; not while torch.compile traces, which would stop at it."""
    inputs = drawn(1, 3, 1)
    gla.scan(*(inputs[n] for n in ("q", "k", "v", "g", "state")))
    assert CALLS == ["fused_recurrent_simple_gla"]
    assert current_backend(inputs["q"], fla="") == "fla"
    assert current_backend(inputs["q"], fla="a reason") == current_backend(inputs["q"]) == "torch"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert current_backend(inputs["q"], fla="") == "torch"


REFUSED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "tensors on cpu; it needs a GPU": ("DEVICES", ("cuda",), {}),
    "inputs in torch.float32; it takes bfloat16": ("DTYPES", (torch.bfloat16,), {}),
    "no tokens": ("OLDEST", fla.OLDEST, {"tokens": 0}),
    "a beta for each value channel": ("OLDEST", fla.OLDEST, {"channels": True}),
    "keys of 8 channels; it takes up to 4": ("_MOST_KEYS", 4, {}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_does_not_take(
    words: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left alone the op runs in torch; asked for, it says why not."""
    name, value, how = REFUSED[words]
    inputs = drawn(1, how.get("tokens", 3), 1)
    beta = torch.rand_like(inputs["v"]) if how.get("channels") else inputs["beta"]
    given = (inputs["q"], inputs["k"], inputs["v"], beta)
    with backend("fla"):
        monkeypatch.setattr(fla, name, value)
        with pytest.raises(ValueError, match=rf"cannot do this: {words}.*Use 'auto'\."):
            delta.scan(*given)
    assert bool(delta.scan(*given)[0].isfinite().all())
    assert CALLS == []


def test_ops_that_it_does_not_have_run_as_ever(library: ModuleType) -> None:
    q, M, z = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 4, 4), torch.rand(1, 1, 4)
    with backend("fla"):
        assert torch.equal(infini.read(q, M, z), infini.read(q, M, z))
        assert current_backend(q) == current_backend() == "torch"


def test_without_it(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, or broken by what it imports: said by name, and nobody else notices."""

    class Broken(ModuleType):
        @property
        def __version__(self) -> str:
            raise RuntimeError("this Triton is too old")

    old = ModuleType("fla")
    old.__version__ = "0.4.2"  # type: ignore[attr-defined]
    cases = {"not installed.*pip install fla-core": None, "Triton is too old": Broken("fla"),
             "version is 0.4.2; it must be 0.5 or newer": old}  # fmt: skip
    for words, module in cases.items():
        monkeypatch.setitem(sys.modules, "fla", module)
        fla._problem.cache_clear()
        said = f"flash-linear-attention cannot be used.*{words}"
        with pytest.raises(ValueError, match=said), backend("fla"):
            pass
        inputs = drawn(1, 3, 1)
        assert gla.scan(inputs["q"], inputs["k"], inputs["v"])[0].shape == (1, 4, 3, 4)
        assert CALLS == []


def test_the_recorded_numbers() -> None:
    """Its plain functions and its kernels against ours: float32 to a few roundings, float16 to its
    own rounding (2**-11 is 5e-4) a few times over, as it keeps what goes between chunks in it."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert set(recorded["versions"]) == {"fla-core", "triton"}
    cases = {name: value for name, value in recorded.items() if "output" in value}
    kinds = {tuple(name.split(", ")[:2]) for name in cases}
    assert kinds == {
        ("plain", "float32"), ("chunked", "float32"), ("chunked", "float16"),
        ("recurrent", "float32"), ("recurrent", "float16"),
    }  # fmt: skip
    assert len(cases) == 6 + 11 + 13 + 13 + 13
    for name, errors in cases.items():
        assert ("gradients" in errors) == (not name.startswith("recurrent")), name
        assert max(errors.values()) <= (2e-6 if "float32" in name else 2e-3), name
