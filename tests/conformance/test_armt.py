"""Conformance of ARMT: every reference case in the folder, through the public classes and ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Case,
    backbone_of,
    compare,
    generated_by,
    logits_of,
    names_of,
    read_case,
    settings_of,
    shift_labels_of,
    states_by_segment,
)
from torch import Tensor

import memwrap
from memwrap.ops import associative, backend

MODEL_TOLERANCES = {"out.": 2e-3, "grad.": 2e-3, "out.loss": 1e-4}
OP_TOLERANCES = {"out.": 1e-9, "grad.": 1e-9}
PROJECTIONS = {"W_mq": "query", "W_mk": "key", "W_mv": "value", "W_mb": "beta"}
COMMON = (
    "variant", "B", "d_mem", "nu", "correction", "n_heads", "use_denom", "gating", "eps",
    "num_mem_tokens",
)  # fmt: skip


def variant_of(case: Case) -> dict[str, Any]:
    """The config fields of a case's variant (generation cases are v1)."""
    variant = case.settings.get("variant", "v1")
    assert variant in ("v1", "v2"), f"{case.name}: variant {variant!r} is not understood"
    assert case.settings.get("eps", 1e-5) == associative.EPS
    names = ("d_mem", "nu", "correction", "n_heads", "use_denom", "gating")
    fields = {n: case.settings[n] for n in names if n in case.settings}
    return fields | {"feature_norm": variant == "v2"}


def run_op(case: Case) -> dict[str, Tensor]:
    """Read and write segment by segment; gradients of the stated loss."""
    case.known(*COMMON, "L", "d_model", "n_segments")
    fields, t = variant_of(case), case.tensors
    names = ("W_mq.weight", "W_mk.weight", "W_mv.weight", "W_mb.weight", "W_mb.bias")
    leaves = {n: t[f"param.{n}"].clone().requires_grad_() for n in names}
    inputs = [n for n in t if n.startswith("in.")]
    leaves |= {n[len("in.") :]: t[n].clone().requires_grad_() for n in inputs}
    heads = case.settings["n_heads"]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def features(x: Tensor) -> Tensor:
        return associative.features(split(x), fields["nu"], fields["feature_norm"])

    batch, width = case.settings["B"], case.settings["d_model"]
    count = 2 * fields["nu"] * fields["d_mem"] // heads
    A = torch.zeros(batch, heads, count, width // heads, dtype=torch.float64)
    z = A[..., 0] if fields["use_denom"] else None
    written = torch.zeros(batch, dtype=torch.bool)
    results: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64)
    for s in range(case.settings["n_segments"]):
        if s:
            q = features(leaves[f"h_{s}"] @ leaves["W_mq.weight"].T)
            read = associative.read(q, A, z).transpose(1, 2).flatten(2)
            results[f"out.read_{s}"] = read
            loss = loss + (read * t[f"ct.read_{s}"]).sum()
        m = leaves[f"m_{s}"]
        k, v = features(m @ leaves["W_mk.weight"].T), split(m @ leaves["W_mv.weight"].T)
        beta = split(torch.sigmoid(m @ leaves["W_mb.weight"].T + leaves["W_mb.bias"]))
        A, z = associative.write(
            k, v, beta, A, z, written, correction=fields["correction"],
            key_eps=0.0 if fields["feature_norm"] else associative.EPS,
        )  # fmt: skip
        written = torch.ones_like(written)
        results[f"out.A_{s}"] = A
        if z is not None:
            results[f"out.z_{s}"] = z
    loss = loss + (A * t["ct.A_final"].view_as(A)).sum()
    if z is not None:
        loss = loss + (z * t["ct.z_final"].view_as(z)).sum()
    loss.backward()
    results["out.loss"] = loss
    unused = torch.zeros_like(leaves["h_0"])  # there is no read in segment 0
    for name, leaf in leaves.items():
        results[f"grad.{name}"] = leaf.grad if leaf.grad is not None else unused
    return results


def model_of(case: Case) -> Any:
    config = memwrap.ARMTConfig(**settings_of(case), **variant_of(case), input_norm=False)
    model = memwrap.wrap(backbone_of(case), config)
    memory = model.memories["armt"]
    with torch.no_grad():
        memory.tokens.copy_(case.tensors["memory"])
        for name, own in parameters_of(model, case).items():
            assert own.shape == case.tensors[name].shape, name
            own.copy_(case.tensors[name])
    return model.eval()


def parameters_of(model: Any, case: Case) -> dict[str, Tensor]:
    """The memory's parameters by the reference's names, `mem.LAYER.W_mq.weight`."""
    layers = model.memories["armt"].layers
    found = {}
    for name in case.tensors:
        if name.startswith("mem."):
            _, layer, projection, kind = name.split(".")
            found[name] = getattr(getattr(layers[layer], PROJECTIONS[projection]), kind)
    return found


def run_model(case: Case) -> dict[str, Tensor]:
    case.known(*COMMON, "T", "segment_size", "segment_alignment")
    model = model_of(case)
    results = {"out.logits": logits_of(model, case)}
    last = states_by_segment(model, case)[-1].memories["armt"]["layers"]
    for name in case.expected:
        kind, _, layer = name.removeprefix("out.").partition(".")
        if kind in ("A", "z"):
            results[name] = last[layer][kind]
    loss = model.train()(
        case.tensors["input_ids"],
        attention_mask=case.tensors.get("attention_mask"),
        shift_labels=shift_labels_of(case),
    ).loss
    results["out.loss"] = loss
    loss.backward()
    results["grad.memory"] = model.memories["armt"].tokens.grad
    results |= {f"grad.{n}": p.grad for n, p in parameters_of(model, case).items()}  # type: ignore[misc]
    prefix = "grad.base."
    parameters = dict(model.backbone.named_parameters())
    for name in case.expected:
        if name.startswith(prefix):
            results[name] = parameters[name[len(prefix) :]].grad  # type: ignore[assignment]
    return results


def run_generation(case: Case) -> dict[str, Tensor]:
    case.known("B", "T", "segment_size", "num_mem_tokens", "max_new_tokens", "nu", "d_mem")
    assert "nothing is written" in case.about["semantics"], "another way to generate"
    return {"gen.ids": generated_by(model_of(case), case)}


def run(case: Case) -> dict[str, Tensor]:
    """Choose by what the case holds; what is not understood fails."""
    if case.about["level"] == "op" and "ct.A_final" in case.tensors:
        return run_op(case)
    if case.about["level"] == "model" and "gen.ids" in case.expected:
        return run_generation(case)
    if case.about["level"] == "model" and "out.logits" in case.expected:
        return run_model(case)
    pytest.fail(f"{case.name}: not understood; it expects {sorted(case.expected)}")


@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("armt"))
def test_armt(name: str, ops: str) -> None:
    case = read_case("armt", name)
    with backend(ops):
        results = run(case)
    compare(case, results, OP_TOLERANCES if case.about["level"] == "op" else MODEL_TOLERANCES)


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("armt", "strange", about, {"out.x": torch.ones(1)}))
