"""Conformance of AHN: a published layer, its recurrence and output, token n entering before query n
reads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import memwrap
from memwrap.memories.ahn import LayerAHN
from memwrap.model.published_ahn import names_of as names_of_ahn
from memwrap.ops import backend

TOLERANCES = Tolerances(reference={"": 1e-5}, float32={"": 1e-5})
# Its A_log is float32 in the public code, and so is exp(A_log): 6e-8 of itself at most.
GATED_DELTA = Tolerances(exact={"": 2e-7}, reference={"": 1e-5}, float32={"": 1e-5})


def layer_of(case: Case) -> tuple[LayerAHN, dict[str, Tensor]]:
    """The layer with the case's weights, as it comes out of a published folder, and its parameters
    by the case's names."""
    heads, width = case.tensors["q"].shape[2:]
    hidden, form = case.tensors["hidden_in"].shape[2], case.settings["ahn_implementation"]
    shape = {
        "model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": 1,
        "num_attention_heads": heads,
    }  # fmt: skip
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            **shape, num_key_value_heads=heads, head_dim=width, intermediate_size=4, vocab_size=8
        )
    ).to(case.dtype)
    weights = {f"model.layers.0.ahn.fn.{n}": x for n, x in case.starting("ahn.fn.").items()}
    about = {**shape, "_ahn_implementation": form, "sliding_window": 4}
    with tempfile.TemporaryDirectory() as name:
        save_file(weights, Path(name, "model.safetensors"))
        Path(name, "config.json").write_text(json.dumps(about))
        model = memwrap.load_ahn(name, base)
    layer: Any = model.memories["ahn"].networks["0"]
    found = {f"ahn.fn.{names_of_ahn(layer)[n]}": p for n, p in layer.named_parameters()}
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
