"""Conformance of ARMT: every reference case in the folder, through the public classes and ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone_of, base_gradients, sizes_in_words
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from models import alignment_of, generated, logits_of, shift_labels_of, states_by_segment
from torch import Tensor

import memwrap
from memwrap.engine.plan import segment_lengths
from memwrap.ops import associative, backend

# What was written is divided by z q, which amplifies: 5e-5 (gradients 4e-4) were met in models.
OP = Tolerances(
    exact={"": 1e-11},
    reference={"": 1e-5, "grad.": 5e-4, "out.loss": 5e-5},
    float32={"": 1e-5, "grad.": 5e-4, "out.loss": 5e-5},
)
MODEL = Tolerances(
    reference={"": 5e-4, "grad.": 2e-3, "out.loss": 1e-5},
    float32={"": 5e-4, "grad.": 2e-3, "out.loss": 1e-5},
)
PROJECTIONS = {"W_mq": "query", "W_mk": "key", "W_mv": "value", "W_mb": "beta"}
FIELDS = ("d_mem", "nu", "correction", "n_heads", "use_denom", "gating")


def variant_of(case: Case) -> dict[str, Any]:
    """The config fields of a case's variant (generation cases are v1)."""
    later = case.among("variant", {"v1": False, "v2": True}, "v1")
    case.holds(eps=associative.EPS)
    fields = {n: case.settings[n] for n in FIELDS if n in case.settings}
    return fields | {"feature_norm": later}


class Op:
    """One layer's memory, made of memwrap's ops and the case's weights."""

    def __init__(self, case: Case) -> None:
        self.fields = variant_of(case)
        weights = case.starting("param.")
        self.leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        inputs = case.starting("in.")
        self.leaves |= {n: x.clone().requires_grad_() for n, x in inputs.items()}
        heads, width = self.fields["n_heads"], weights["W_mv.weight"].shape[0]
        assert weights["W_mb.weight"].shape[0] == (width if self.fields["gating"] else heads)
        assert weights["W_mk.weight"].shape[0] == self.fields["d_mem"]
        batch, length = inputs["h_0"].shape[:2]
        case.holds(
            B=batch, L=length, d_model=width, num_mem_tokens=inputs["m_0"].shape[1],
            n_segments=len(inputs) // 2,
        )  # fmt: skip
        count = 2 * self.fields["nu"] * self.fields["d_mem"] // heads
        self.A = torch.zeros(batch, heads, count, width // heads, dtype=case.dtype)
        self.z = self.A[..., 0] if self.fields["use_denom"] else None
        self.written = torch.zeros(batch, dtype=torch.bool)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.fields["n_heads"], -1)).transpose(1, 2)

    def features(self, x: Tensor, name: str) -> Tensor:
        x = self.split(x @ self.leaves[f"{name}.weight"].T)
        return associative.features(x, self.fields["nu"], self.fields["feature_norm"])

    def read(self, s: int) -> Tensor:
        q = self.features(self.leaves[f"h_{s}"], "W_mq")
        return associative.read(q, self.A, self.z).transpose(1, 2).flatten(2)

    def write(self, s: int) -> None:
        m = self.leaves[f"m_{s}"]
        v = self.split(m @ self.leaves["W_mv.weight"].T)
        strength = m @ self.leaves["W_mb.weight"].T + self.leaves["W_mb.bias"]
        self.A, self.z = associative.write(
            self.features(m, "W_mk"), v, self.split(torch.sigmoid(strength)), self.A, self.z,
            self.written, correction=self.fields["correction"],
            key_eps=0.0 if self.fields["feature_norm"] else associative.EPS,
        )  # fmt: skip
        self.written = torch.ones_like(self.written)


def run_op(case: Case) -> Got:
    """Read and write segment by segment; gradients of the stated loss."""
    op, t = Op(case), case.tensors
    results: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=case.dtype)
    for s in range(case.settings["n_segments"]):
        if s:
            results[f"out.read_{s}"] = op.read(s)
            loss = loss + (results[f"out.read_{s}"] * t[f"ct.read_{s}"]).sum()
        op.write(s)
        results[f"out.A_{s}"] = op.A
        if op.z is not None:
            results[f"out.z_{s}"] = op.z
    loss = loss + (op.A * t["ct.A_final"].view_as(op.A)).sum()
    if op.z is not None:
        loss = loss + (op.z * t["ct.z_final"].view_as(op.z)).sum()
    loss.backward()
    results["out.loss"] = loss
    return results | gradients_of(op.leaves)  # nothing reaches h_0: there is no read in segment 0


def model_of(case: Case, mask: Tensor | None) -> Any:
    config = memwrap.ARMTConfig(
        segment_size=case.settings["segment_size"],
        num_memory_tokens=case.settings["num_mem_tokens"],
        alignment=alignment_of(case),
        count_padding=mask is not None and not bool(mask.all()),
        input_norm=False,
        read_scale="raw",
        **variant_of(case),
    )
    model = memwrap.wrap(backbone_of(case, sizes_in_words(case)), config)
    with torch.no_grad():
        model.memories["armt"].tokens.copy_(case.tensors["memory"])
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


def run_model(case: Case) -> Got:
    ids, mask = case.tensors["input_ids"], case.given("attention_mask")
    model = model_of(case, mask)
    case.holds(B=len(ids), T=ids.shape[1])
    results = {"out.logits": logits_of(model, ids, mask, case.want("out.logits"))}
    lengths = segment_lengths(ids.shape[1], case.settings["segment_size"], alignment_of(case))
    last = states_by_segment(model, ids, mask, lengths)[-1].memories["armt"]["layers"]
    for name in case.tensors:
        kind, _, layer = name.removeprefix("out.").partition(".")
        if kind in ("A", "z"):
            results[name] = last[layer][kind]
    loss = model.train()(ids, attention_mask=mask, shift_labels=shift_labels_of(case)).loss
    loss.backward()
    results |= {"out.loss": loss, "grad.memory": model.memories["armt"].tokens.grad}
    results |= {f"grad.{n}": p.grad for n, p in parameters_of(model, case).items()}  # type: ignore[misc]
    return results | base_gradients(model, case)


def run_generation(case: Case) -> Got:
    ids = case.tensors["input_ids"]
    case.holds(B=len(ids), T=ids.shape[1])
    assert "nothing is written" in case.says, f"{case.name}: another way to generate"
    model = model_of(case, None)
    return {"gen.ids": generated(model, ids, case.settings["max_new_tokens"])}


def run(case: Case) -> Got:
    """Choose by what the case holds; what is not understood fails."""
    if case.level == "op" and "ct.A_final" in case.tensors:
        return run_op(case)
    if case.level == "model" and "gen.ids" in case.tensors:
        return run_generation(case)
    if case.level == "model" and "out.logits" in case.tensors:
        return run_model(case)
    return case.not_understood()


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        compare(case, run(case), OP if case.level == "op" else MODEL)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("armt"))
def test_armt(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("armt", name, dtype), ops)
