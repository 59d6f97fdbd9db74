"""RMT's gates: by their formulas, between RMT and a memory that never changes, and trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import assert_pieces_and_padding
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, ids, wrapped

GATES = ("bias", "lstm")


def formula(memory: Any, old: Tensor, hidden: Tensor) -> Tensor:
    """One vector after the other, in float64."""
    made = []
    for m, h in zip(old.double().flatten(0, 1), hidden.double().flatten(0, 1), strict=True):
        if memory.config.gate == "bias":
            share = 1 / (1 + torch.exp(-memory.share.double()))
            made.append(share * m + (1 - share) * h)
            continue
        gate = memory.lstm
        forget = gate.forget.weight.double() @ h + gate.forget.bias.double() + 1
        enter = gate.enter.weight.double() @ h + gate.enter.bias.double() - 1
        new = torch.tanh(gate.new.weight.double() @ h)
        made.append(m / (1 + torch.exp(-forget)) + new / (1 + torch.exp(-enter)))
    return torch.stack(made).view_as(old)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_its_formula(gate: str) -> None:
    memory: Any = wrapped("rmt", gate=gate).memories["rmt"]
    old, hidden = torch.randn(2, 2, 3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = memory.write_suffix({"tokens": old}, hidden)["tokens"]
        assert_close(got.double(), formula(memory, old, hidden), 1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_pieces_and_padding_give_what_a_text_gives(gate: str) -> None:
    assert_pieces_and_padding(wrapped("rmt", gate=gate))


def test_a_share_goes_from_rmt_to_a_memory_that_stays() -> None:
    """At -20 (2e-9 stays) it is RMT, at 20 the learned tokens are all there ever is."""
    text, plain = ids(2, 27), wrapped("rmt")
    state = plain.read(text)
    low = memwrap.wrap(build("llama"), "rmt", segment_size=8, num_memory_tokens=3,
                       gate="bias", gate_init=-20.0).eval()  # fmt: skip
    memory: Any = low.memories["rmt"]
    learned = plain.memories["rmt"].tokens
    with torch.no_grad():
        memory.tokens.copy_(learned)
    assert_close(low.read(text).memories["rmt"]["tokens"], state.memories["rmt"]["tokens"], 1e-5)
    with torch.no_grad():
        memory.share.fill_(20.0)
    kept = low.read(text).memories["rmt"]["tokens"]
    assert_close(kept, learned.expand(2, -1, -1), 1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_learns_and_is_saved(gate: str, tmp_path: Any) -> None:
    model = memwrap.wrap(build("llama"), "rmt", segment_size=8, num_memory_tokens=3, gate=gate)
    text = ids(2, 32)
    model.train()(text, labels=text).loss.backward()
    memory: Any = model.memories["rmt"]
    gradients = {n: p.grad for n, p in memory.named_parameters()}
    assert all(g is not None and float(g.abs().max()) > 0 for g in gradients.values()), gradients
    assert [g["weight_decay"] for g in memory.optimizer_groups()] == [0.0] * (gate == "bias")
    model.eval().save_pretrained(tmp_path)
    again = memwrap.load(tmp_path, build("llama"))
    want = model.read(text).memories["rmt"]["tokens"]
    assert torch.equal(again.read(text).memories["rmt"]["tokens"], want)
