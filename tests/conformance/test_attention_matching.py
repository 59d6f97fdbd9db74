"""Conformance of attention matching: choice of keys, biases, values, budgets; every case, by both
implementations."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from torch import Tensor

from memwrap.ops import backend
from memwrap.ops import compaction as ops
from memwrap.testing.margins import record

# In float32 the values are compared through what they give: their systems are ill-conditioned.
TOLERANCES = Tolerances(
    reference={"": 1e-9},
    float32={"": 2e-4, "c2": math.inf, "metrics": 2e-2},
    # The public water-filling stops a little above the cap.
    exact={"": 1e-9, "capped": 1e-7},
)
MADE = ("seed", "smallest_relative_gap_of_selection", "condition_of_M", "condition_of_X")
POOLING = {None: None, "avgpool": "mean", "maxpool": "max"}
RIDGES = {"spectral": "largest", "frobenius": "mean", "fixed": "one"}


def matching_of(case: Case) -> ops.Matching:
    """The settings, by the public code's names."""
    s = case.settings
    omp = s.get("algorithm") == "omp"
    assert s.get("algorithm") in (None, "omp", "highest_attention_keys")
    solver = case.among("c2_solver", {n: n for n in ("lstsq", "cholesky", "pinv")}, "lstsq")
    ridge = s.get("c2_ridge_lambda", 0)
    zero = s.get("zerobeta", False) or case.among(
        "beta_method", {"nnls": False, "zero": True}, "nnls"
    )
    schedule = s.get("progressive_schedule")
    return ops.Matching(
        selection="omp" if omp else "attention",
        score=s.get("score_method", "max"),
        pooling=case.among("pooling", POOLING),
        pooling_width=s.get("kernel_size", 7),
        choices=s.get("k_choice", 1),
        refit_every=s.get("nnls_interval", 1),
        schedule=schedule and tuple(tuple(entry) for entry in schedule),
        drop_below=s.get("drop_key_beta_cutoff"),
        absolute=s.get("use_abs_corr", False),
        normalized=s.get("normalize_exp_scores", False),
        fit_bias=not zero,
        lower=s.get("nnls_lower_bound") or 1e-12,
        upper=s.get("nnls_upper_bound") or math.inf,
        steps=s.get("nnls_iters", 0),
        relative=False,
        fit_values=case.among("c2_method", {"lsq": True, "direct": False}, "lsq"),
        ridge=0 if solver == "lstsq" else ridge,
        ridge_of=case.among("c2_ridge_scale", RIDGES, "spectral"),
        towards_old=False,
        keep_all=False,
    )  # fmt: skip


def attention(
    q: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], scaling: float
) -> tuple[Tensor, Tensor]:
    """Output `(H, m, Dv)` and logarithm of the mass `(H, m)` over keys, biases and values of KV
    heads."""
    k, bias, v = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    groups = len(q) // len(k)
    k, bias, v = (x.repeat_interleave(groups, 0) for x in (k, bias, v))
    scores = q @ k.transpose(1, 2) * scaling + bias[:, None]
    return torch.softmax(scores, -1) @ v, scores.logsumexp(-1)


def check_biases(case: Case, bias: Tensor, filled: Tensor) -> None:
    """Compare biases, logarithms, by the weights' relative error; a slot that is not filled has
    none."""
    want = case.tensors["beta"].to(bias.dtype)
    assert torch.equal(want > -math.inf, filled), f"{case.name}: other slots are filled"
    error = float((bias - want)[filled].abs().max())
    allowed = TOLERANCES.of(case)[""]
    record(error, allowed, "beta")
    assert error <= allowed, f"{case.name}: beta: {error:.2e} > {allowed:.0e}"


def read_slots(case: Case, c1: Tensor, beta: Tensor, c2: Tensor, old: Tensor) -> Got:
    """What other queries find in the slots, alone and beside later keys."""
    t = case.tensors
    q, k, v, dtype = t["q_test"], t["k"], t["v"], case.dtype
    scaling = q.shape[-1] ** -0.5
    slots, full = (c1, beta.to(dtype), c2.to(dtype)), (k, old, v)
    got: Got = {}
    out, lse = {}, {}
    for name, parts in (("full", full), ("compact", slots)):
        out[name], lse[name] = attention(q, [parts], scaling)
        got |= {f"out_{name}": out[name], f"lse_{name}": lse[name]}
        if "k_local" in t:
            here = t["k_local"], t["k_local"].new_zeros(t["k_local"].shape[:2]), t["v_local"]
            got[f"out_joint_{name}"] = attention(q, [parts, here], scaling)[0]
    heads = len(k)
    of, oc = (out[n].reshape(heads, -1, v.shape[-1]) for n in ("full", "compact"))
    error = (oc - of).norm(dim=-1) / of.norm(dim=-1)
    mass = ((lse["compact"] - lse["full"]).exp() - 1).abs().reshape(heads, -1)
    cosine = torch.cosine_similarity(of, oc, dim=-1)
    got["metrics"] = torch.stack([
        (oc - of).square().mean((1, 2)), error.mean(1), error.amax(1), cosine.mean(1),
        mass.mean(1), mass.amax(1),
    ], 1)  # fmt: skip
    return got


def run_heads(case: Case) -> Got:
    t, s = case.tensors, case.settings
    q, k, v = t["q"], t["k"], t["v"]
    heads, group = len(k), len(q) // len(k)
    case.holds(
        Hkv=heads, G=group, H=len(q), n_per_head=q.shape[1], N_per_kv_head=group * q.shape[1],
        T=k.shape[1], d=k.shape[2], dv=v.shape[2], scale="1/sqrt(d)",
    )  # fmt: skip
    if "q_test" in t:
        case.holds(m=t["q_test"].shape[1])
    if "k_local" in t:
        case.holds(L=t["k_local"].shape[1])
    case.aside(*MADE, "keys_dropped_per_head")
    old = case.given("attention_bias")
    bias = k.new_zeros(k.shape[:2]) if old is None else old
    block = ops.KeyValueBlock(
        ops.stack_groups(q[None], heads), k[None], v[None], k.shape[2] ** -0.5, bias[None]
    )
    start = case.given("power_start")
    found = ops.compact(block, s["t"], matching_of(case), None if start is None else start[None])
    index, filled = found.index[0], found.filled[0]
    case.holds(filled=filled.sum(1).tolist())
    check_biases(case, found.bias[0], filled)
    beta, c2 = found.bias[0].masked_fill(~filled, -math.inf), found.value[0]
    c1 = k.gather(1, index[..., None].expand(-1, -1, k.shape[2])) * filled[..., None]
    # What the public code gives instead loses the old bias; it is no result of ours.
    case.tensors.used |= {"beta_published", "c2_published"} & case.tensors.keys()
    got: Got = {"indices": index.masked_fill(~filled, -1), "c1": c1, "c2": c2}
    return got | read_slots(case, c1, beta, c2, bias)


def run_ranking(case: Case) -> Got:
    """One ranking of the keys of all layers and heads."""
    t, s = case.tensors, case.settings
    q, k, v = t["q"], t["k"], t["v"]
    layers, heads, tokens = k.shape[:3]
    case.holds(
        L=layers, Hkv=heads, N_per_kv_head=q.shape[2], T=tokens, d=k.shape[3],
        n_per_head=q.shape[2] // s["G"],
    )  # fmt: skip
    case.aside(*MADE)
    matching = matching_of(case)
    block = ops.KeyValueBlock(q, k, v, k.shape[3] ** -0.5, case.given("attention_bias"))
    scores = ops.key_scores(block, matching)
    chosen = ops.best_of_all(scores, s["t"] * layers * heads)
    count = chosen.sum(-1)
    size = int(count.max())
    index = (~chosen).to(torch.int8).argsort(dim=-1, stable=True)[..., :size]
    filled = torch.arange(size) < count[..., None]
    found = ops.fit(block, index.masked_fill(~filled, 0), filled, matching)
    check_biases(case, found.bias, filled)
    return {
        "count": count, "indices": index.masked_fill(~filled, -1), "c2": found.value,
    }  # fmt: skip


def run_budgets(case: Case) -> Got:
    s, shares = case.settings, case.tensors["proportions"]
    case.holds(L=shares.shape[0], Hkv=shares.shape[1])
    case.aside(*MADE)
    most, total = s["max_ratio_per_head"], s["t"] * shares.numel()
    capped = ops.capped_shares(shares, most * s["T"] / total)
    budgets = ops.slots_of_shares(shares, s["t"], s["T"], most)
    case.holds(
        total=int(budgets.sum()), capped_heads=int((capped >= capped.max() * (1 - 1e-9)).sum())
    )
    return {"capped": capped, "budgets": budgets}


def check(case: Case, name: str = "torch") -> None:
    kinds = {"proportions": run_budgets, "count": run_ranking, "indices": run_heads}
    run = next((r for n, r in kinds.items() if n in case.tensors), None)
    if run is None:
        case.not_understood()
    with backend(name):
        compare(case, run(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("implementation", ["naive", "torch"])
@pytest.mark.parametrize("name", names_of("attention_matching"))
def test_case(name: str, implementation: str, dtype: torch.dtype) -> None:
    check(read_case("attention_matching", name, dtype), implementation)
