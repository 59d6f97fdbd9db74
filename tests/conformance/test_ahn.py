"""Conformance of AHN: a published layer, its recurrence and output, token n entering before query n
reads."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from torch import Tensor

import memwrap
from memwrap.backbones import AttentionSizes
from memwrap.memories.ahn import LayerAHN
from memwrap.memories.sizes import Sizes
from memwrap.model.published_ahn import FORMS, fill
from memwrap.model.published_ahn import names_of as published_names
from memwrap.ops import backend

TOLERANCES = Tolerances(reference={"": 1e-5}, float32={"": 1e-5})
# Its A_log is float32 in the public code, and so is exp(A_log): 6e-8 of itself at most.
GATED_DELTA = Tolerances(exact={"": 2e-7}, reference={"": 1e-5}, float32={"": 1e-5})


def layer_of(case: Case) -> tuple[LayerAHN, dict[str, Tensor]]:
    """The layer, filled as from a published checkpoint, and its parameters by the case's names."""
    heads, width = case.tensors["q"].shape[2:]
    hidden, form = case.tensors["hidden_in"].shape[2], case.among("ahn_implementation", FORMS)
    own = AttentionSizes(heads, heads, width, width)
    sizes = Sizes(
        hidden_size=hidden, embedding_size=hidden, num_layers=1, embedding_std=1.0,
        dtype=case.dtype, backbone_dtype=case.dtype, attention={0: own},
    )  # fmt: skip
    layer = LayerAHN(memwrap.AHNConfig(form=form), own, sizes)
    fill(layer, case.starting("ahn.fn."), case.name)
    found = {f"ahn.fn.{published_names(layer)[n]}": p for n, p in layer.named_parameters()}
    if layer.read_bias is not None:  # two biases that are only ever added
        found["ahn.fn.dt_proj.bias"] = layer.bias
    return layer, found


def run(case: Case) -> Got:
    if case.level != "op" or "hidden_in" not in case.tensors:
        case.not_understood()
    layer, parameters = layer_of(case)
    leaves = case.leaves("hidden_in", "hidden_out", "q", "k", "v")
    q, k, v = (leaves[n].transpose(1, 2) for n in "qkv")
    batch, heads, count, width = q.shape
    case.holds(
        B=batch, N=count, hidden_size=leaves["hidden_in"].shape[2], num_heads=heads,
        head_dim=width, use_q_proj=False, use_ahn_router=False,
    )  # fmt: skip
    case.aside("seed")
    gates = layer.gates(leaves["hidden_in"])
    state = q.new_zeros(batch, heads, width, width, dtype=gates.dtype)
    everything = torch.ones(batch, count, dtype=torch.bool)
    read, state = layer.scan(q, k, v, gates, state, everything)
    out = layer.output(read, leaves["hidden_out"]).flatten(2)
    (out * case.tensors["dout"]).sum().backward()
    published = state.mT if layer.read_bias is not None else state
    return {"out": out, "state": published} | gradients_of(leaves) | gradients_of(parameters)


def check(case: Case, ops: str = "torch") -> None:
    tolerances = GATED_DELTA if "ahn.fn.a_proj.weight" in case.tensors else TOLERANCES
    with backend(ops):
        compare(case, run(case), tolerances)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("ahn"))
def test_ahn(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("ahn", name, dtype), ops)
