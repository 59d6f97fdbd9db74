"""Conformance of Infini-attention: the cases with a whole model."""

from __future__ import annotations

import pytest
import torch
from cases import names_of, read_case
from models import base_of, check, run, segment_size_of

import memwrap

NAMES = [n for n in names_of("infini") if n.startswith("model_") or n == "no case found"]
# float32 against a float32 reference; states are sums of 64 tokens.
TOLERANCES = {"": 2e-5, "grad.": 1e-4, "M_": 1e-5, "z_": 1e-5}


@pytest.mark.parametrize("name", NAMES)
def test_model(name: str) -> None:
    case = read_case("infini", name)
    case.known("base", "segment_lengths", "update", "first_segment", "rope_positions")
    assert case.settings["rope_positions"] == "restart per segment"
    config = memwrap.InfiniConfig(
        segment_size=segment_size_of(case),
        update=case.settings["update"],
        first_segment=case.settings["first_segment"],
    )
    model = memwrap.wrap(base_of(case), config)
    gates = model.memories["infini"].gates
    with torch.no_grad():
        for layer, beta in enumerate(case.tensors["memory.beta"]):
            gates[str(layer)].copy_(beta)
    own = {"memory.beta": lambda: torch.stack([b.grad for b in gates.values()])}
    got = run(model, case, own)
    layers = got.pop("state").memories["infini"]["layers"]
    for layer, tree in layers.items():
        got |= {f"{n}_final.layer{layer}": tree[n] for n in ("M", "z")}
    check(case, got, TOLERANCES)
