"""Conformance of mixtures of memories: the op, and the public layer through the same parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from torch import Tensor

from memwrap.ops import backend, delta
from memwrap.ops.mixture import Routing

# All cases are of float64; the layer's, through convolutions and a norm, differs by 9e-13.
TOLERANCES = Tolerances(reference={}, float32={"": 1e-5}, exact={"": 1e-11})


def as_rows(x: Tensor) -> Tensor:
    """`(N, B, T, H, ...)` of N states to rows `(B * N, H, T, ...)`."""
    return x.transpose(0, 1).flatten(0, 1).transpose(1, 2)


def mixture(case: Case, routing: Routing, read: Tensor) -> Tensor:
    """What all states give together `(B, H, T, V)`, of `read` `(B * N, H, T, V)`."""
    count = routing.weights.shape[-1]
    read = read.unflatten(0, (len(routing.weights), -1))
    return routing.mixed(read[:, :count]) + read[:, count:].sum(1)


def run_op(case: Case) -> Got:
    t, own = case.tensors, case.settings
    names = ("q", "k", "v", "g", "beta", "router_logits", "sk", "sv", "sg", "sbeta")
    leaves = case.leaves(*names, "initial_state")
    q, logits, state = leaves["q"], leaves["router_logits"], leaves.get("initial_state")
    shared = "sk" in t
    case.holds(
        B=len(q), T=q.shape[1], H=q.shape[2], K=q.shape[3], V=leaves["v"].shape[-1],
        num_memories=logits.shape[-1], shared=shared, initial_state=state is not None,
        padding=not bool(t["valid"].all()),
    )  # fmt: skip
    case.aside("seed")

    def joined(name: str) -> Tensor:
        parts = [leaves[name], *([leaves[f"s{name}"][None]] if shared else [])]
        return as_rows(torch.cat(parts))

    k, v, beta, g = (joined(n) for n in ("k", "v", "beta", "g"))
    routing, valid = Routing.of(logits, own["topk"]), t["valid"].bool()
    count = len(k) // len(q)
    first = None if state is None else state.transpose(0, 1).flatten(0, 1)
    out, last = delta.scan(
        q.repeat_interleave(count, 0).transpose(1, 2), k, v, beta, g, first, l2norm=True,
        mask=routing.mask(valid, shared),
    )  # fmt: skip
    got: Got = {
        "o": mixture(case, routing, out).transpose(1, 2),
        "final_state": last.unflatten(0, (-1, count)).transpose(0, 1),
        # of all tokens at once
        "aux": Routing.of(logits.flatten(0, 1)[None], own["topk"]).imbalance(valid.flatten()[None]),
    }
    ((got["o"] * t["do"]).sum() + 0.01 * got["aux"].sum()).backward()  # type: ignore[union-attr]
    return got | gradients_of(leaves)


def run_layer(case: Case) -> Got:
    """Projections, convolutions, norm and gate of the public layer by hand, around the parts."""
    own, t, w = case.settings, case.tensors, case.starting("layer.")
    x = t["x"].clone().requires_grad_()
    gate = w["gate.weight"].clone().requires_grad_()
    heads, memories, shared = own["num_heads"], own["num_memories"], own["shared_mem"]
    case.holds(B=len(x), T=x.shape[1], hidden_size=x.shape[2], head_dim=len(w["o_norm.weight"]),
               single_kv_proj=False, expand_v=1, conv_size=w["q_conv1d.weight"].shape[2],
               num_memories=len(gate))  # fmt: skip
    case.aside("seed")
    logits = x @ gate.T
    routing = Routing.of(logits, own["topk"])
    sent = routing.mask(torch.ones(x.shape[:2], dtype=torch.bool), shared)
    states = [f"{{}}_proj.{m}.weight" for m in range(memories)] + ["shared_{}.weight"] * shared

    def projected(name: str) -> Tensor:
        maps = torch.stack([w[state.format(name)] for state in states])
        return torch.einsum("btd,ncd->bntc", x, maps).flatten(0, 1)

    def convolved(rows: Tensor, name: str) -> Tensor:
        """Over the tokens that a state takes in, as if no others stood between."""
        taps, done = w[f"{name}_conv1d.weight"], []
        for row, here in zip(rows, sent, strict=True):
            short = F.pad(row[here].T, (taps.shape[2] - 1, 0))[None]
            found = F.silu(F.conv1d(short, taps, groups=len(taps)))[0].T
            done.append(torch.zeros_like(row).index_put((here,), found))
        return torch.stack(done).unflatten(-1, (heads, -1)).transpose(1, 2)

    q = (x @ w["q_proj.weight"].T).repeat_interleave(len(states), 0)  # rows of states
    q = convolved(q, "q")
    k, v = (convolved(projected(n), n) for n in "kv")
    beta = projected("b").sigmoid().transpose(1, 2)
    step = F.softplus(projected("a") + w["dt_bias"])
    rate = w["A_log"].float().exp().to(x.dtype)  # a float32 parameter there
    g = (-rate * step).transpose(1, 2)
    out, _ = delta.scan(q, k, v, beta, g, l2norm=True, mask=sent)
    o = mixture(case, routing, out).transpose(1, 2)
    y = F.rms_norm(o, o.shape[-1:], w["o_norm.weight"], own["norm_eps"])
    y = y * F.silu(x @ w["g_proj.weight"].T).unflatten(-1, (heads, -1))
    y = y.flatten(2) @ w["o_proj.weight"].T
    (y * t["dy"]).sum().backward()
    return {"y": y, "router_logits": logits, "grad.x": x.grad,  # type: ignore[dict-item]
            "grad.layer.gate.weight": gate.grad}  # fmt: skip


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        compare(case, run_layer(case) if "x" in case.tensors else run_op(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("ops", ["naive", "torch"])
@pytest.mark.parametrize("name", names_of("mom"))
def test_case(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("mom", name, dtype), ops)
