"""Memorizing attention: what the shared invariants do not ask."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support import assert_pieces_and_padding, crossed
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, assert_close, error_of, gradients, ids, wrapped

VARIANTS: list[dict[str, Any]] = [
    {"combine": c, "qk_norm": q, "cache_size": s}
    for c, q, s in (("gate", True, 20), ("joint", False, 20), ("joint", True, 5))
]


def layer(state: Any, number: int = 0) -> dict[str, Tensor]:
    return state.memories["memorizing"]["layers"][str(number)]


@pytest.mark.parametrize(
    ("variant", "family"), crossed(VARIANTS, ["llama", "gemma2", "gemma3", "gpt2", "phi3"], 2)
)
def test_pieces_and_padding(family: str, variant: dict) -> None:
    assert_pieces_and_padding(wrapped("memorizing", family, **variant))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_variants_start_neutral_and_train(family: str, variant: dict) -> None:
    base, text = build(family), ids(2, SEGMENT)
    with torch.no_grad():
        want = base(text).logits
    model = memwrap.wrap(base, "memorizing", segment_size=SEGMENT, layers=[0, 1], **variant)
    with torch.no_grad():
        assert_close(model(text).logits, want)
    text = ids(2, 4 * SEGMENT)
    model.train()(text, labels=text).loss.backward()
    found = gradients(model)
    own = [n for n in found if n.startswith("memory_modules")]
    assert len(own) == 2 * ((variant["combine"] == "gate") + variant["qk_norm"])
    assert all(float(found[n].abs().max()) > 0 for n in own)


def joined_by_hand(attention: str, family: str = "llama", **base: Any) -> tuple[Tensor, Tensor]:
    """The second segment's output of layer 0 with all entries retrieved: by the memory, and by
    plain attention over un-rotated past keys and the segment's rotated ones."""
    model = wrapped(
        "memorizing", base=build(family, attention=attention, **base), combine="joint",
        top_k=99, layers=[0],
    )  # fmt: skip
    text, found = ids(1, 2 * SEGMENT), {}
    memory = model.memories["memorizing"]
    plain = type(memory).attend

    def attend(number: int, seen: Any, state: Any) -> Any:
        out = plain(memory, number, seen, state)
        if state["count"].any():
            groups = seen.groups
            keys, values = (state[n].repeat_interleave(groups, 1) for n in ("key", "value"))
            own, own_values = (
                x.repeat_interleave(groups, 1) for x in (seen.rotated_key, seen.value)
            )
            scores = seen.query @ keys.transpose(-1, -2) * seen.scaling
            near = seen.rotated_query @ own.transpose(-1, -2) * seen.rotated_scaling
            both = torch.cat([scores, near], -1)
            cap = seen.softcap
            if cap is not None:
                both = cap * torch.tanh(both / cap)
            visible = torch.ones_like(near, dtype=torch.bool).tril()
            if seen.window is not None:
                visible = visible & ~torch.ones_like(visible).tril(-seen.window)
            there = torch.cat([torch.ones_like(scores, dtype=torch.bool), visible], -1)
            weights = both.masked_fill(~there, float("-inf")).softmax(-1)
            want = weights @ torch.cat([values, own_values], 2)
            found["got"], found["want"] = out[0], want.transpose(1, 2)
        return out

    memory.attend = attend
    with torch.no_grad():
        model(text)
    return found["got"], found["want"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_joint_is_one_softmax(attention: str) -> None:
    got, want = joined_by_hand(attention)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("cap", [50.0, 2.0])
def test_joint_is_one_softmax_under_a_soft_cap(cap: float) -> None:
    """At a cap of 2 most scores lie near it, and their sum beyond it."""
    got, want = joined_by_hand("eager", "gemma2", attn_logit_softcapping=cap)
    assert_close(got, want, 1e-4)


def test_the_cache_is_the_last_tokens() -> None:
    """Un-rotated keys of layer 0 belong to their token alone: entries can be recognised."""
    model = memwrap.wrap(build("llama"), "memorizing", segment_size=8, cache_size=20, layers=[0])
    text = ids(1, 5 * SEGMENT)
    state = model.read(text)
    tree = layer(state)
    assert tree["key"].shape == (1, 2, 20, 8) and tree["count"].tolist() == [40]
    alone = [layer(model.close_segment(model.read(t[None, None])))["key"] for t in text[0]]
    for entry in range(20, 40):
        assert_close(tree["key"][:, :, entry % 20], alone[entry][:, :, 0], 1e-5)


def test_growth_is_the_declared_bytes_until_the_cache_is_full() -> None:
    model = memwrap.wrap(build("llama"), "memorizing", segment_size=8, cache_size=32)
    declared = model.memories["memorizing"].bytes_per_token
    assert declared == 1 * 2 * (8 + 8) * 4  # one layer, 2 KV heads, keys and values, float32
    sizes = [model.read(ids(1, n * SEGMENT)).nbytes for n in range(1, 7)]
    steps = [after - before for before, after in pairwise(sizes)]
    assert steps == [declared * SEGMENT] * 3 + [0, 0]


def test_by_default_one_layer_at_three_quarters() -> None:
    model = memwrap.wrap(build("llama", num_hidden_layers=4), "memorizing")
    assert list(model.new_state(1).memories["memorizing"]["layers"]) == ["3"]


def test_gradients_reach_what_was_written() -> None:
    """Through retrieved entries, within `bptt_segments`; none with 1, as published."""
    found = {}
    for window in (None, 1):
        model = wrapped("memorizing", layers=[1], bptt_segments=window)
        embeds = model.get_input_embeddings()(ids(1, 3 * SEGMENT)).detach().requires_grad_()
        labels = ids(1, 3 * SEGMENT).masked_fill(torch.arange(3 * SEGMENT) < 2 * SEGMENT, -100)
        model.train()(inputs_embeds=embeds, labels=labels).loss.backward()
        found[window] = embeds.grad[0].abs().sum(-1)
    # The first target is predicted by the last token of the second segment.
    assert float(found[None][:SEGMENT].max()) > 0
    assert not found[1][:SEGMENT].any() and float(found[1][2 * SEGMENT :].max()) > 0


def test_a_new_document_is_a_new_state_row() -> None:
    model = wrapped("memorizing")
    states = model.read(ids(2, 3 * SEGMENT))
    fresh = model.new_state(1)
    both = memwrap.MemoryState.cat([states.select(torch.tensor([1])), fresh])
    text = ids(2, SEGMENT, seed=4)
    with torch.no_grad():
        got = model(text, cache=both).logits
        assert_close(got[1], model(text[1:]).logits[0])
        assert error_of(got[0], model(text[:1]).logits[0]) > 1e-2


def test_gates_and_scales_have_their_own_optimizer_group() -> None:
    memory = wrapped("memorizing", qk_norm=True).memories["memorizing"]
    (group,) = memory.optimizer_groups()
    assert group["lr"] == 1e-2 and group["weight_decay"] == 0.0
    assert [p.shape for p in group["params"]] == [(4,)] * 4
    assert memory.figures()["gate"].shape == (2, 4)
    assert wrapped("memorizing", combine="joint").memories["memorizing"].optimizer_groups() == []


def test_a_state_file_with_a_damaged_buffer_is_refused(tmp_path: Any) -> None:
    model = wrapped("memorizing")
    state = model.read(ids(1, 2 * SEGMENT))
    tree = layer(state)
    tree["key"] = tree["key"][..., :4]
    state.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.key has shape"):
        memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
