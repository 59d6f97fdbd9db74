"""flash-linear-attention against memwrap's ops on a CPU: outputs, last states and gradients.

python benchmarks/fla_agreement.py  (with fla-core in the environment, and no GPU)

Its plain functions and, through `memwrap.ops.fla`, its kernels in Triton's interpreter. Each error
is the largest difference from memwrap's chunked torch in float64, over the largest number there.
The kernels are those of a copy, for two things that the interpreter cannot do: a loop counter is a
plain number there, without `.to`, and the autotuner finds no device, so the first of its
configurations is taken. bfloat16 is left out: the interpreter's products of it are wrong.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
import triton
from common import save
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from memwrap.ops import backend, delta, fla, gla
from memwrap.ops.gla import gsa

Inputs = dict[str, Any]
ROWS, HEADS, GROUP, KEYS, VALUES, SLOTS = 2, 2, 2, 32, 16, 16
SCALE = KEYS**-0.5  # what the plain functions without an argument for it take


def copied(folder: Path) -> None:
    """Import flash-linear-attention from a copy that the interpreter can run."""
    found = find_spec("fla")
    if found is None or not found.submodule_search_locations:
        sys.exit("fla_agreement: `pip install fla-core` first")
    target = folder / "fla"
    shutil.copytree(found.submodule_search_locations[0], target)
    for path in target.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\b(i_\w+)\.to\(tl\.int64\)", r"(\1 + tl.zeros((), tl.int64))", text)
        path.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    prepare = Autotuner.__init__

    def first(self: Any, fn: Any, names: Any, configs: list[Any], *rest: Any, **more: Any) -> None:
        prepare(self, fn, names, configs[:1], *rest, **more)

    Autotuner.__init__ = first


def drawn(rows: int, tokens: int, states: int) -> Inputs:
    """One set of inputs of everything; keys are unit vectors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    own = (rows, HEADS, tokens)
    return {
        "q": normal(rows, HEADS * GROUP, tokens, KEYS),
        "k": F.normalize(normal(*own, KEYS), dim=-1), "v": normal(*own, VALUES),
        "beta": uniform(*own), "g": uniform(*own) / -2,
        "gk": uniform(*own, KEYS) / -2, "s": uniform(*own, SLOTS), "gs": uniform(*own, SLOTS) / -2,
        "state": normal(states, HEADS, KEYS, VALUES), "keys": normal(states, HEADS, KEYS, SLOTS),
        "values": normal(states, HEADS, SLOTS, VALUES),
    }  # fmt: skip


# The names of the inputs of a form, and it by memwrap and by the adapter (cu: joined sequences).
FORMS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "a gate a channel": (
        "q k v gk state",
        lambda q, k, v, g, s, cu: gla.scan(q, k, v, g, s, scale=SCALE, cu_seqlens=cu),
        lambda q, k, v, g, s, cu: fla.gla(q, k, v, g, s, SCALE, cu),
    ),
    "a gate a head": (
        "q k v g state",
        lambda q, k, v, g, s, cu: gla.scan(q, k, v, g, s, scale=SCALE, cu_seqlens=cu),
        lambda q, k, v, g, s, cu: fla.gla(q, k, v, g, s, SCALE, cu),
    ),
    "no gate": (
        "q k v state",
        lambda q, k, v, s, cu: gla.scan(q, k, v, None, s, scale=SCALE, cu_seqlens=cu),
        lambda q, k, v, s, cu: fla.gla(q, k, v, None, s, SCALE, cu),
    ),
    "delta rule": (
        "q k v beta state",
        lambda q, k, v, b, s, cu: delta.scan(q, k, v, b, None, s, scale=SCALE, cu_seqlens=cu),
        lambda q, k, v, b, s, cu: fla.delta(q, k, v, b, None, s, SCALE, False, cu),
    ),
    "gated delta rule": (
        "q k v beta g state",
        lambda q, k, v, b, g, s, cu: delta.scan(q, k, v, b, g, s, scale=SCALE, cu_seqlens=cu),
        lambda q, k, v, b, g, s, cu: fla.delta(q, k, v, b, g, s, SCALE, False, cu),
    ),
    "gated delta rule, l2norm": (
        "q k v beta g state",
        lambda q, k, v, b, g, s, cu: delta.scan(
            q, 3 * k, v, b, g, s, scale=SCALE, l2norm=True, cu_seqlens=cu
        ),
        lambda q, k, v, b, g, s, cu: fla.delta(q, 3 * k, v, b, g, s, SCALE, True, cu),
    ),
    "slots": (
        "q k v s gs keys values",
        lambda q, k, v, s, g, a, b, cu: gsa.scan(q, k, v, s, g, (a, b), scale=SCALE),
        lambda q, k, v, s, g, a, b, cu: fla.gsa(q, k, v, s, g, (a, b), SCALE),
    ),
}


def plain(form: str) -> Callable[..., Any] | None:
    """One of the library's plain functions, in memwrap's layout."""
    names = {"a gate a channel": ("gla", "naive_recurrent_gla"),
             "a gate a head": ("simple_gla", "naive_recurrent_simple_gla"),
             "no gate": ("linear_attn", "naive_recurrent_linear_attn"),
             "gated delta rule": ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
             "slots": ("gsa", "naive_recurrent_gsa")}  # fmt: skip
    last = {"initial_state": None, "output_final_state": True}
    if form == "delta rule":
        function = importlib.import_module("fla.ops.delta_rule.naive").delta_rule_recurrence

        def run(q: Tensor, *rest: Any) -> Any:  # heads before tokens, as here
            k, v, beta, state = (x.repeat_interleave(GROUP, 1) for x in rest[:-1])
            out, end = function(q, k, v, beta, **last | {"initial_state": state})
            return out, end[:, ::GROUP]

        return run
    if form not in names:
        return None
    module, name = names[form]
    function = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)

    def turned(q: Tensor, *rest: Any) -> Any:
        group = 1 if form == "slots" else GROUP  # it repeats by itself
        many = 2 if form == "slots" else 1
        given = [x.repeat_interleave(group, 1) for x in rest[:-1]]
        states = given[-many:]
        first = states[0] if many == 1 else tuple(states)
        inputs = (x.transpose(1, 2) for x in (q, *given[:-many]))
        out, end = function(*inputs, **last | {"initial_state": first})
        ends = end if many == 2 else (end,)
        ends = tuple(x[:, ::group] for x in ends)
        return out.transpose(1, 2), ends if many == 2 else ends[0]

    return turned


def results(
    function: Callable[..., Any], inputs: list[Tensor], cu: Any, train: bool
) -> list[Tensor]:
    """Output, last states and, if it trains, the gradients of everything."""
    leaves = [x.detach().clone().requires_grad_(train) for x in inputs]
    with torch.set_grad_enabled(train):
        out, states = function(*leaves, cu)
    parts = [out, *(states if isinstance(states, tuple) else (states,))]
    if train:
        weighed = [
            (x.double() * torch.linspace(0.5, 1, x.numel(), dtype=torch.double).view_as(x)).sum()
            for x in parts
        ]
        sum(weighed).backward()  # type: ignore[union-attr]
    return [*(x.detach() for x in parts), *(x.grad for x in leaves if x.grad is not None)]


def errors(got: list[Tensor], want: list[Tensor], states: int) -> dict[str, float]:
    each = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(got, want, strict=True)
    ]
    found = {"output": each[0], "states": max(each[1 : 1 + states])}
    return found | ({"gradients": max(each[1 + states :])} if each[1 + states :] else {})


def measured(form: str, kind: str, dtype: torch.dtype, joined: bool) -> dict[str, float] | None:
    """The errors of one form; None where there is nothing to compare.

    Args:
        kind: "plain", "chunked" (with gradients) or "recurrent" (20 tokens without).
        dtype: of queries, keys and values; gates, strengths and states are float32.
        joined: three sequences in one row, one of them empty.
    """
    names, own, theirs = FORMS[form]
    tokens = 20 if kind == "recurrent" else 70
    drawing = drawn(1, tokens, 3) if joined else drawn(ROWS, tokens, ROWS)
    cu = torch.tensor([0, 5, 5, tokens]) if joined else None
    if kind == "plain":
        found = plain(form)
        if found is None or joined:
            return None
        theirs = found
    inputs = [drawing[n].to(dtype) if n in ("q", "k", "v") else drawing[n] for n in names.split()]
    with backend("torch"):
        want = results(own, [x.double() for x in inputs], cu, kind != "recurrent")
    got = results(theirs, inputs, cu, kind != "recurrent")
    return errors(got, want, 2 if form == "slots" else 1)


def main() -> None:
    torch.set_num_threads(1)
    values: dict[str, Any] = {
        "versions": {
            "fla-core": importlib.metadata.version("fla-core"),
            "triton": triton.__version__,
        }
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        copied(Path(folder))
        for kind, dtype in (
            ("plain", torch.float32), ("chunked", torch.float32), ("chunked", torch.float16),
            ("recurrent", torch.float32), ("recurrent", torch.float16),
        ):  # fmt: skip
            for form in FORMS:
                for joined in (False, True):
                    if joined and (form == "slots" or kind == "plain"):
                        continue
                    # The chunked delta rule refuses float32.
                    if (kind, form, dtype) == ("chunked", "delta rule", torch.float32):
                        continue
                    found = measured(form, kind, dtype, joined)
                    name = f"{kind}, {str(dtype)[6:]}, {form}{', joined' if joined else ''}"
                    if found is not None:
                        values[name] = found
    save("fla_agreement", values)


if __name__ == "__main__":
    main()
