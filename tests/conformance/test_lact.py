"""Conformance of fast weights: LaCT's whole operation, and Titans' recurrences by the paper.

Every chunk is read with the weights that it found and then written. Titans' outputs are those of
every token's own weights: what a chunk's beginning up to that token writes.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case

from memwrap.ops import backend, fast_weights
from memwrap.ops.fast_weights import FastMemory, StepRule, Weights, WriteGates

# Newton-Schulz carries rounding in a gradient's small directions up to those of its large ones:
# float32 by up to 490, the product of the first coefficients.
TOLERANCES = Tolerances(reference={}, float32={"": 1e-5, "grad.": 1e-5})
MUON = Tolerances(
    reference={}, float32={"": 1e-5, "grad.": 1e-3, "state.": 1e-4}, exact={"": 1e-11}
)
# Written by titans-pytorch, whose memory is another: it learns a norm's scale too, adds its input
# to a normed output, takes the mean over channels, gates a chunk and not a token, and (but for the
# stream) takes every gradient at the first weights, which never sees what is already stored.
ANOTHER = ("op_public_depth1", "op_public_depth2_heads2", "op_public_no_momentum",
           "op_public_stream_ubs")  # fmt: skip
MEMORIES = {"linear": "linear", "mlp2": "mlp"}


def lact(case: Case) -> Got:
    if case.level != "op":
        case.not_understood()
    names = ("w0", "w1", "w2", "q", "k", "v", "lr0", "lr1", "lr2", "momentum")
    leaves = case.leaves(*names)
    moving, chunk = case.among("momentum", {True: True, False: False}), case.settings["chunk"]
    rule = StepRule(
        step=case.among("muon", {True: "muon", False: "gradient"}),
        row_norm=case.among("norm", {"post": "post", "pre": "pre"}),
    )
    count, tokens, width = leaves["q"].shape
    inner, value = leaves["w0"].shape[1], leaves["v"].shape[2]
    case.holds(N=count, T=tokens, dk=width, dh=inner, dv=value)
    case.aside("seed")
    assert moving == ("momentum" in leaves)
    one = {name: leaf[None] for name, leaf in leaves.items()}
    first: Weights = (one["w0"], one["w1"], one["w2"])
    zero = tuple(torch.zeros_like(w) for w in first) if moving else None
    memory = FastMemory(first, zero, first if rule.keeps_sum else None)
    rates = torch.cat([one["lr0"], one["lr1"], one["lr2"]], -1)
    outputs, got = [], {}
    for number, start in enumerate(range(0, tokens, chunk)):
        part = slice(start, start + chunk)
        outputs.append(fast_weights.read(rule.network, memory.weights, one["q"][:, :, part]))
        if start + chunk >= tokens:
            break  # the last chunk of a call is not written there
        eta = one["momentum"][:, :, part, 0] if moving else None
        gates = WriteGates(rates[:, :, part], eta)
        memory = fast_weights.write(
            rule, memory, one["k"][:, :, part], one["v"][:, :, part], gates, first
        )
        kept = {"w": memory.weights, "momentum": memory.momentum, "main": memory.total}
        got |= {
            f"state.{name}{i}.{number}": part[0]
            for name, parts in kept.items()
            for i, part in enumerate(parts or ())
        }
    o = torch.cat(outputs, 2)[0]
    (o * case.tensors["do"]).sum().backward()
    return {"o": o} | got | gradients_of(leaves)


def titans(case: Case) -> Got:
    if case.level != "op" or "theta" not in case.tensors:
        case.not_understood()
    leaves = case.leaves("q", "k", "v", "theta", "eta", "alpha", "memory.init0", "memory.init1")
    network = case.among("memory_model", MEMORIES)
    batch, tokens, width = leaves["q"].shape
    inner = leaves["memory.init0"].shape[0] if network == "mlp" else None
    case.holds(batch=batch, tokens=tokens, dim=width, hidden=inner)
    chunk, rule = case.settings["chunk"], StepRule(network=network, step="titans")
    first = tuple(
        leaves[f"memory.init{i}"].expand(batch, 1, -1, -1) for i in range(1 + (network == "mlp"))
    )
    memory = FastMemory(first, tuple(torch.zeros_like(w) for w in first))
    q, k, v = (leaves[name][:, None] for name in "qkv")
    theta, eta, alpha = (leaves[name][:, None] for name in ("theta", "eta", "alpha"))
    before, after, got = [], [], {}
    for number, start in enumerate(range(0, tokens, chunk), 1):
        latest = memory
        for token in range(start, start + chunk):
            part = slice(start, token + 1)
            gates = WriteGates(theta[:, :, part, None], eta[:, :, part], alpha[:, :, part])
            query = q[:, :, token : token + 1]
            before.append(fast_weights.read(network, latest.weights, query))
            latest = fast_weights.write(rule, memory, k[:, :, part], v[:, :, part], gates, first)
            after.append(fast_weights.read(network, latest.weights, query))
        memory = latest
        for name, parts in (("M", memory.weights), ("S", memory.momentum)):
            got |= {f"{name}{i}_after_chunk_{number}": w[:, 0] for i, w in enumerate(parts or ())}
    y = torch.cat(after, 2)[:, 0]
    loss = (y * case.tensors["loss_weight"]).sum()
    loss.backward()
    results = {"y_after": y, "y_before": torch.cat(before, 2)[:, 0], "loss": loss[None]}
    return results | got | gradients_of(leaves)


def check(case: Case, ops: str = "torch") -> None:
    muon = case.settings.get("muon", False)
    with backend(ops):
        got = lact(case) if case.method == "lact" else titans(case)
        compare(case, got, MUON if muon else TOLERANCES)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("lact"))
def test_lact(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("lact", name, dtype), ops)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", [n for n in names_of("titans") if n not in ANOTHER])
def test_titans(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("titans", name, dtype), ops)
