"""Compact memory: variants that the shared invariants, run on one config, do not meet, and states
compacted and joined as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_pieces_and_padding, refused

import memwrap
from memwrap.memories import compact as compact_module
from memwrap.memories.parts import whole_states
from memwrap.model.compaction import REQUEST
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_states,
    error_of,
    ids,
    wrapped,
)

WHOLE: dict[str, Any] = {
    "segment_size": 8, "memory_size": None, "num_sinks": 2, "reference_every": 2, "slots": 5,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {"selection": "omp"},
    {"selection": "max", "reference_every": 1},
    {"merge": "select", "selection": "mean"},
    {"merge": "mean", "similarity": 0.3},
    {"share_weights": True},
    {"num_sinks": 0, "memory_size": 11},
    {"max_distance": 9},
    {"budgets": {"L0H0": 0.4, "L0H1": 0.2, "L1H0": 0.1, "L1H1": 0.3}},
    {"memory_size": None},
    {"layers": [1]},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_pieces_and_padding(variant: dict) -> None:
    family = ("llama", "qwen3")[VARIANTS.index(variant) % 2]
    assert_pieces_and_padding(wrapped("compact", family, **variant))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "smollm3", "granite", "gpt_neox"])
def test_slots_that_suffice_are_full_attention(family: str) -> None:
    """Streaming, and compacted as a whole: nothing is lost, and places are true."""
    base, text, tail = build(family), ids(2, 45), ids(2, 9, seed=5)
    with torch.no_grad():
        want = base(torch.cat([text, tail], 1)).logits
        model = memwrap.wrap(base, "compact", segment_size=8, slots=64, memory_size=6, num_sinks=2)
        assert_close(model(torch.cat([text, tail], 1)).logits, want, 1e-5)
        memwrap.unwrap(model)
        model = memwrap.wrap(base, memwrap.CompactConfig(**WHOLE))
        state = model.read(text)
        for queries, given in (("own", None), (text, None), ("repeat", text)):
            small = model.compact(state, 43, queries, text=given)
            assert_close(model(tail, cache=small).logits, want[:, 45:], 1e-5)
        assert_close(model(tail, cache=state).logits, want[:, 45:], 1e-5)


@pytest.mark.parametrize("queries", ["own", "text"])
def test_a_whole_state_made_small(queries: str, tmp_path: Path) -> None:
    """It is nearer to full attention than keys that were only chosen, and it is a state like any
    other: rows do not meet, it is saved, loaded, read on, and compacted again."""
    base, text, tail = build("llama"), ids(2, 60), ids(2, 9, seed=5)
    given = "own" if queries == "own" else text
    errors = []
    for merge in ("match", "select"):
        model = memwrap.wrap(base, memwrap.CompactConfig(**WHOLE, merge=merge))
        state = model.read(text)
        before = state.clone()
        small = model.compact(state, 20, given)
        assert_same_states(state, before, 0.0)
        with torch.no_grad():
            want = model(tail, cache=state.clone()).logits
            got = model(tail, cache=small.clone()).logits
        errors.append(error_of(got, want))
        if merge == "select":
            memwrap.unwrap(model)
            break
        assert small.tokens_seen.tolist() == [60, 60] and small.nbytes < 0.5 * state.nbytes
        first = model.read(text[:1])
        alone = model.compact(first, 20, given if queries == "own" else text[:1])
        assert_same_states(alone, small.select(torch.tensor([0])))
        small.save(tmp_path / "small.safetensors")
        loaded = memwrap.MemoryState.load(tmp_path / "small.safetensors", model)
        with torch.no_grad():
            assert torch.equal(model(tail, cache=loaded).logits, got)
        again = model.compact(small, 10, text)
        assert int(again.memories["compact"]["layers"]["0"]["slot_count"].max()) == 10
        memwrap.unwrap(model)
    assert errors[0] < errors[1], errors


class Letters:
    """A tokenizer of one id a letter, with a chat template."""

    chat_template = "<user>{}<model>"

    def apply_chat_template(self, turns: list[dict[str, str]], **options: bool) -> str:
        return self.chat_template.format(turns[0]["content"])

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 32 for letter in text]}


def test_what_was_read_is_said_once_more() -> None:
    """Without a chat template the repetition is the text itself, with one its answer to a request,
    in rows of any length; the text is needed, and for nothing else."""
    model = memwrap.wrap(build("llama"), memwrap.CompactConfig(**WHOLE))
    rows = [[5, 6, 7, 8] * 12, [9, 8, 7] * 7]
    state = model.read(rows)
    plain = model.compact(state, 9, rows)
    assert_same_states(model.compact(state, 9, "repeat", text=rows), plain, 0)
    asked = Letters()(f"<user>{REQUEST}<model>")["input_ids"]
    want = model.compact(state, 9, [asked + row for row in rows])
    said = model.compact(state, 9, "repeat", text=rows, tokenizer=Letters())
    assert_same_states(said, want, 0)
    errors = model.compaction_errors(state, 9, "repeat", text=rows)
    assert len(errors) == 2 and all(bool((error > 0).all()) for error in errors.values())
    for given in ({"queries": "repeat"}, {"queries": "own", "text": rows}):
        with pytest.raises(ValueError, match='queries="repeat" runs a text behind'):
            model.compact(state, 9, **given)


def test_states_of_several_documents_are_joined() -> None:
    """Each keeps its own places; joined states are read, compacted and joined again."""
    model = memwrap.wrap(build("llama"), memwrap.CompactConfig(**WHOLE))
    texts, tail = [ids(2, n, seed=n) for n in (30, 21)], ids(2, 9, seed=5)
    states = [model.compact(model.read(text), 12) for text in texts]
    both = model.compose(states)
    tree, *parts = (s.memories["compact"]["layers"]["1"] for s in (both, *states))
    assert both.tokens_seen.tolist() == [51, 51]
    assert tree["slot_count"].tolist() == [[12 + 12 + 2] * 2] * 2  # the second one's sinks too
    assert torch.equal(tree["slot_place"][..., :12], parts[0]["slot_place"])
    assert torch.equal(tree["slot_place"][..., 14:], parts[1]["slot_place"])
    with torch.no_grad():
        alone = model(tail, cache=states[0].clone()).logits
        joined = model(tail, cache=both.clone()).logits
    assert error_of(joined, alone) > 1e-2
    whole = model.compose([model.read(text) for text in texts])
    small = model.compact(whole, 12)  # the queries of both are kept
    assert int(small.memories["compact"]["layers"]["0"]["slot_count"].max()) == 12
    assert model.compose([small, both]).tokens_seen.tolist() == [102, 102]


def test_budgets_of_heads() -> None:
    shares = {"L0H0": 0.4, "L0H1": 0.2, "L1H0": 0.1, "L1H1": 0.3}
    model = wrapped("compact", budgets=shares)  # 5 slots of 4 heads
    tree = model.read(ids(1, 60)).memories["compact"]["layers"]
    assert tree["0"]["slot_count"].tolist() == [[8, 4]]
    assert tree["1"]["slot_count"].tolist() == [[2, 6]]
    with refused("budgets", "'L1H1' is missing or foreign"):
        wrapped("compact", budgets={"L0H0": 0.4, "L0H1": 0.2, "L1H0": 0.1})


@pytest.mark.parametrize("whole", [False, True], ids=["streaming", "whole"])
def test_references_stand_behind_all_that_they_judge(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There slots are read. Of several documents, behind all of them."""
    seen = []

    def watched(attention: Any, rows: Any, budget: Any, references: Any, *rest: Any) -> Any:
        asked = references.weight[:, 0] > 0
        seen.append((rows.place[rows.valid].max(), references.place[asked].min()))
        return folded(attention, rows, budget, references, *rest)

    module = whole_states if whole else compact_module
    folded = module.compacted
    monkeypatch.setattr(module, "compacted", watched)
    model = wrapped("compact", **(WHOLE if whole else {}))
    states = [model.read(ids(2, n, seed=n)) for n in (60, 21)]
    if whole:
        model.compact(states[0], 5)
        model.compact(model.compose(states), 5)
    assert seen and all(float(row) < float(query) for row, query in seen), seen


def test_what_cannot_be_compacted_is_refused() -> None:
    model = wrapped("compact")
    state = model.read(ids(2, 30))
    with refused("no queries of its text", "give `queries` a text"):
        model.compact(state, 5)
    for slots in (0, 2.5):
        with refused("`slots`", "integer of at least 1"):
            model.compact(state, slots, ids(2, 5))
    with refused("3 rows, the state 2"):
        model.compact(state, 5, ids(3, 5))
    with refused(r"states of \[\] rows"):
        model.compose([])
    with refused("'window'", "'compact'"):
        other = wrapped("window")
        other.compact(other.read(ids(1, 9)), 5)


def test_mass_that_was_folded_again_and_again_is_kept() -> None:
    """Equal keys: a slot's bias grows with all that it stands for, over many folds."""
    model = wrapped("compact", slots=1, num_sinks=0, memory_size=1, bias_bound=30.0)
    text = ids(1, 1).expand(1, 6 * SEGMENT)
    tree = model.read(text).memories["compact"]["layers"]["0"]
    # In the first layer, without rotation, all keys are one; places differ, so the mass is near.
    assert float(tree["slot_bias"].exp().min()) > 10
