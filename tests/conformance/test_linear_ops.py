"""Conformance of gated linear attention and the delta rules: the plain recurrences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from torch import Tensor

from memwrap.ops import backend, delta, gla

TOLERANCES = Tolerances(reference={"": 3e-6}, float32={"": 1e-5})
NAMES = {
    "gla": names_of("gla"), "delta_rule": names_of("delta_rule"), "kda": names_of("kda"),
    "gdn2": names_of("gdn2"),
}  # fmt: skip
CASES = [(method, name) for method, names in NAMES.items() for name in names]


def turned(x: Tensor) -> Tensor:
    """`(B, T, H, ...)` to `(B, H, T, ...)` and back."""
    return x.transpose(1, 2)


def run(case: Case) -> Got:
    """Output, last state and all gradients."""
    t, group = case.tensors, case.settings.get("group", 1)
    leaves = case.leaves("q", "k", "v", "g", "beta", "initial_state")
    x = {n: turned(leaf) for n, leaf in leaves.items() if n != "initial_state"}
    q, k, v = x["q"], x["k"], x["v"]
    case.holds(
        B=len(q), H=q.shape[1], T=q.shape[2], K=q.shape[3], V=v.shape[3],
        group=v.shape[1] // q.shape[1], initial_state="initial_state" in t, gated="g" in t,
        beta_per_value_channel="beta" in t and x["beta"].dim() == 4,
    )  # fmt: skip
    case.aside("seed", "gate", "beta_max")
    shared = {"scale": case.settings["scale"], "cu_seqlens": case.given("cu_seqlens")}
    if case.settings["scale_is_default"]:
        case.holds(scale=q.shape[3] ** -0.5)
        shared["scale"] = None
    state = leaves.get("initial_state")
    if case.method == "gla":
        out, state = gla.scan(q, k, v, x["g"], state, **shared)
    else:
        q, k = (n.repeat_interleave(group, 1) for n in (q, k))
        out, state = delta.scan(
            q, k, v, x["beta"], x.get("g"), state, l2norm=case.settings["qk_l2norm"], **shared
        )
    got = {"o": turned(out), "final_state": state}
    ((got["o"] * t["do"]).sum() + (state * t["dht"]).sum()).backward()
    return got | gradients_of(leaves)


def run_by_key(case: Case) -> Got:
    """The same of the delta rules with gates of key channels, KDA and GDN-2."""
    t = case.tensors
    inputs = ("q", "k", "v", "g", "beta", "b", "w", "initial_state", "raw", "A_log", "dt_bias")
    leaves = case.leaves(*inputs)
    gate = gate_of(case, leaves)
    got: Got = {} if "g" in leaves else {"g": gate}
    x = {n: turned(leaf) for n, leaf in leaves.items() if leaf.dim() > 2}
    q, k, v = x["q"], x["k"], x["v"]
    case.holds(
        B=len(q), H=q.shape[1], HV=v.shape[1], T=q.shape[2], K=q.shape[3], V=v.shape[3],
        initial_state="initial_state" in t,
    )  # fmt: skip
    case.aside("seed")
    q, k = (n.repeat_interleave(v.shape[1] // q.shape[1], 1) for n in (q, k))
    strength, state = x["w"] if "w" in x else x["beta"], leaves.get("initial_state")
    out, state = delta.scan(q, k, v, strength, turned(gate), state, erase=x.get("b"))
    got |= {"o": turned(out), "final_state": state}
    ((got["o"] * t["do"]).sum() + (state * t["dht"]).sum()).backward()  # type: ignore[operator]
    return got | gradients_of(leaves)


def gate_of(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    """The log of the decay, `(B, T, H, K)`: given, or made by one of the layers' maps."""
    bound = case.settings["lower_bound"]
    if case.settings["gate"] is None and bound is None:
        return leaves["g"]
    del leaves["g"]  # a result
    raw = leaves["raw"] + leaves["dt_bias"].unflatten(0, leaves["raw"].shape[2:])
    rate = leaves["A_log"].exp()[:, None]
    kinds = {
        ("softplus", True): lambda: -rate * F.softplus(raw),
        ("lower_bound", False): lambda: bound * torch.sigmoid(rate * raw),
    }
    return kinds[case.settings["gate"], bound is None]()


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        by_key = case.method in ("kda", "gdn2")
        compare(case, run_by_key(case) if by_key else run(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("ops", ["naive", "torch"])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_recurrences(method: str, name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case(method, name, dtype), ops)
