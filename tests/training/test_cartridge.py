"""Cartridges: slots of a document trained against the model that has it before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.training.cartridge import Cartridge, first_tokens, train_cartridge

DOCUMENT = "def area(width, height):\n    return width * height\n\n\n" * 6
SETTINGS = Cartridge(
    slots=12, steps=6, talks=6, held_out=2, chunk_tokens=24, question_tokens=6, answer_tokens=6,
    batch=3, temperature=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    folder = asset("tiny-lm")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return memwrap.wrap(base, "compact", memory_size=None), AutoTokenizer.from_pretrained(folder)


def test_training_follows_the_full_context(lm: tuple[Any, Any]) -> None:
    """The divergence falls from both starts; sinks, weights and places stay; the result is a state
    like any other, and the same for the same seed."""
    model, tokenizer = lm
    before = {n: p.clone() for n, p in model.named_parameters()}
    for start in ("match", "first"):
        settings = replace(SETTINGS, start=start)
        trained = train_cartridge(model, tokenizer, DOCUMENT, settings)
        assert trained.steps == 6 and trained.losses[-1] < trained.losses[0], trained.losses
        tree = trained.state.memories["compact"]["layers"]["1"]
        assert not tree["slot_key"].requires_grad
        assert tree["slot_count"].unique().tolist() == [12]
        full = model.close_segment(model.read(DOCUMENT, tokenizer=tokenizer))
        small = model.compact(full, 12) if start == "match" else first_tokens(model, full, 12)
        was = small.memories["compact"]["layers"]["1"]
        for name in ("sink_key", "sink_value", "slot_place"):
            assert torch.equal(tree[name], was[name])
        for name in ("slot_key", "slot_value", "slot_bias"):
            assert not torch.equal(tree[name], was[name])
        for name in ("full", "compaction", "start", "no document", "trained"):
            assert len(trained.nats[name]) == 2
    again = train_cartridge(model, tokenizer, DOCUMENT, settings)
    assert again.losses == trained.losses
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
    assert trained.state.nbytes < 0.5 * full.nbytes
    out = model.generate(
        torch.tensor([[5, 6]]), cache=trained.state, attention_mask=torch.ones(1, 2, dtype=int),
        max_new_tokens=3, pad_token_id=0,
    )  # fmt: skip
    assert out.shape[1] <= 5


def test_first_tokens_are_those_of_the_document(lm: tuple[Any, Any]) -> None:
    """All of a document's tokens as slots: what it gives is full attention."""
    model, tokenizer = lm
    full = model.close_segment(model.read(DOCUMENT, tokenizer=tokenizer))
    tokens = int(full.tokens_seen[0])
    small = first_tokens(model, full, tokens - 4)
    tail = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        want, got = (model(tail, cache=s.clone()).logits for s in (full, small))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_what_cannot_be_trained_is_refused(lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    with refused("no more than slots"):
        train_cartridge(model, tokenizer, "short", SETTINGS)
    with refused("`batch`", "at least 1"):
        replace(SETTINGS, batch=0)
    with refused("`start`", "'first'"):
        replace(SETTINGS, start="random")
