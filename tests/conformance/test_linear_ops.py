"""Conformance of gated linear attention and the delta rule: recurrences in plain float32."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, names_of, read_case
from torch import Tensor

from memwrap.ops import backend, delta, gla

SETTINGS = ("B", "T", "H", "K", "V", "scale", "scale_is_default", "gate", "initial_state", "seed")
OWN = ("group", "gated", "qk_l2norm", "beta_per_value_channel", "beta_max")
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")


def turned(x: Tensor) -> Tensor:
    """`(B, T, H, ...)` to `(B, H, T, ...)` and back."""
    return x.transpose(1, 2)


def check(case: Case, scan: Any, weak: bool) -> None:
    """Output, last state and all gradients; the reference itself is float32."""
    leaves = {n: case.tensors[n].clone().requires_grad_() for n in INPUTS if n in case.tensors}
    given = {n: turned(x) for n, x in leaves.items() if n != "initial_state"}
    out, state = scan(given, leaves.get("initial_state"))
    got = {"o": turned(out), "final_state": state}
    loss = (got["o"] * case.tensors["do"]).sum() + (state * case.tensors["dht"]).sum()
    loss.backward()
    got |= {f"grad.{n}": x.grad for n, x in leaves.items()}
    assert got.keys() == case.expected
    for name, value in got.items():
        want = case.tensors[name]
        error = float((value.detach() - want).abs().max() / want.abs().max())
        assert error < (3e-5 if weak else 1e-5), f"{name}: {error:.1e}"


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("name", names_of("gla"))
def test_gated_linear_attention(name: str, implementation: str) -> None:
    case = read_case("gla", name, ("o", "final_state"))
    case.known(*SETTINGS)
    case.given(*INPUTS, "do", "dht", "cu_seqlens")
    own = case.settings
    scale = None if own["scale_is_default"] else own["scale"]

    def scan(x: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        cu = case.tensors.get("cu_seqlens")
        return gla.scan(x["q"], x["k"], x["v"], x["g"], state, scale=scale, cu_seqlens=cu)

    with backend(implementation):
        check(case, scan, own["gate"] == "weak")


@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("name", names_of("delta_rule"))
def test_delta_rule(name: str, implementation: str) -> None:
    case = read_case("delta_rule", name, ("o", "final_state"))
    case.known(*SETTINGS, *OWN)
    case.given(*INPUTS, "do", "dht")
    own = case.settings
    assert own["gated"] == ("g" in case.tensors)
    assert own["beta_per_value_channel"] == (case.tensors["beta"].dim() == 4)
    scale = None if own["scale_is_default"] else own["scale"]

    def scan(x: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k = (x[n].repeat_interleave(own["group"], 1) for n in ("q", "k"))
        return delta.scan(
            q, k, x["v"], x["beta"], x.get("g"), state, scale=scale, l2norm=own["qk_l2norm"]
        )

    with backend(implementation):
        check(case, scan, own["gate"] == "weak")
