"""Extended Mind and the library: what the shared invariants do not ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_pieces_and_padding
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.memories.extended_mind import retrieved
from memwrap.retrieval.library import CONVERSATION
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_states,
    error_of,
    ids,
    wrapped,
)

VARIANTS: list[dict[str, Any]] = [
    {"positions": p, "similarity_threshold": s} for p, s in (("none", None), ("zero", 0.3))
]
BOOKS = {"first": ids(40, seed=1), "second": ids(21, seed=2), "third": ids(5, seed=3)}


def library(family: str = "llama", **settings: Any) -> memwrap.Library:
    values = {"segment_size": 16, "cache_size": 200, "top_k": 4, **settings}
    return memwrap.Library.encode(wrapped("extended_mind", family, **values), BOOKS)


def layer(state: Any, number: int = 0) -> dict[str, Tensor]:
    return state.memories["extended_mind"]["layers"][str(number)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_pieces_and_padding(family: str, variant: dict) -> None:
    assert_pieces_and_padding(wrapped("extended_mind", family, **variant))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_no_memories_it_is_the_base(family: str) -> None:
    base, text = build(family), ids(2, 40)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, "extended_mind", segment_size=48)
        assert_close(model(text).logits, want, 1e-6)


def test_windows_leave_what_the_model_makes_of_them() -> None:
    """Entries of a document in overlapping windows: each from the window that first held it."""
    books = library()
    assert len(books.entries) == sum(map(len, BOOKS.values()))
    model = books.model
    tree = layer(books.state, 1)
    for name, start, stop, window in (
        ("first", 0, 16, 0), ("first", 16, 24, 8), ("first", 24, 32, 16), ("second", 16, 21, 8),
    ):  # fmt: skip
        text = BOOKS[name][window : window + 16]
        alone = layer(model.close_segment(model.read(text)), 1)
        first = 0 if name == "first" else len(BOOKS["first"])
        got = tree["key"][:, :, first + start : first + stop]
        assert_close(got, alone["key"][:, :, start - window : stop - window], 1e-5)
    third = books.entries[books.entries[:, 0] == 2]
    assert third[:, 1].tolist() == list(range(5))


def test_special_tokens_leave_no_entry() -> None:
    model = wrapped("extended_mind", segment_size=16, cache_size=200)
    text = ids(30)
    text[[0, 17]] = torch.tensor([1, 2])  # beginning and end of text in the backbone's config
    books = memwrap.Library.encode(model, {"a": text})
    assert books.entries[:, 1].tolist() == [t for t in range(30) if t not in (0, 17)]
    everything = memwrap.Library.encode(model, {"a": text}, special_ids=[])
    assert len(everything.entries) == 30
    kept = layer(everything.state)["key"][:, :, books.entries[:, 1]]
    assert_close(layer(books.state)["key"], kept, 1e-6)


@pytest.mark.parametrize("size", [7, 50])
def test_a_full_cache_keeps_the_last_entries(size: int) -> None:
    books = library(cache_size=size)
    whole, count = layer(library().state, 1), len(books.entries)
    tree = layer(books.state, 1)
    assert tree["key"].shape[2] == size and tree["count"].tolist() == [count]
    for number in range(count - size, count):
        assert_close(tree["value"][:, :, number % size], whole["value"][:, :, number], 1e-5)
    found = books.cite(ids(4), ids(3, seed=1))
    named = [s for spans in found.tokens for s in spans]
    assert named and all(
        number in range(count - size, count) for number in map(first_entry, [books] * 99, named)
    )


def first_entry(books: memwrap.Library, span: Any) -> int:
    number = list(BOOKS).index(span.document)
    same = (books.entries == torch.tensor([number, span.start])).all(1)
    return int(same.nonzero().item())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_citations_are_the_attention(family: str) -> None:
    """A value of the library is changed: the output moves by its weight."""
    books = library(family, layers=[1])
    question, answer = ids(4, seed=5), ids(6, seed=6)
    found = books.cite(question, answer, least=0.0)
    for spans in found.tokens:
        assert 0 < sum(s.weight for s in spans) < 1
    by_entry = torch.zeros(len(answer), len(books.entries))
    for index, spans in enumerate(found.tokens):
        for span in spans:
            start = first_entry(books, span)
            by_entry[index, start : start + span.end - span.start] += span.weight
    text = torch.cat([question, answer[:-1]])[None]
    with torch.no_grad(), retrieved() as notes:
        books.model(text, cache=books.state.clone())
    (note,) = notes
    want = torch.zeros(len(answer), len(books.entries))
    for index in range(len(answer)):
        place = len(question) - 1 + index
        for head in range(4):
            for entry, weight in zip(
                note.entries[0, head, place], note.weights[0, head, place], strict=True
            ):
                want[index, entry] += weight / 4
    # Spans share their weight among entries; compare what each document got.
    for number in range(3):
        own = books.entries[:, 0] == number
        got = [sum(s.weight for s in spans if s.document == list(BOOKS)[number])
               for spans in found.tokens]  # fmt: skip
        assert_close(torch.tensor(got), want[:, own].sum(1), 1e-5)
    total = sum(s.weight for s in found.spans)
    assert total == pytest.approx(float(want.sum() / len(answer)), rel=1e-5)


def test_weights_say_how_much_of_a_value_is_read() -> None:
    books = library(layers=[0])
    text = ids(1, 5, seed=4)
    outs: list[Tensor] = []
    memory = books.model.memories["extended_mind"]
    plain = type(memory).attend

    def attend(*args: Any) -> Any:
        out = plain(memory, *args)
        outs.append(out[0])
        return out

    memory.attend = attend
    with torch.no_grad(), retrieved() as notes:
        books.model(text, cache=books.state.clone())
        entry = int(notes[0].entries[0, 2, 3, 1])
        weight = notes[0].weights[0, 2, 3, 1]
        other = books.state.clone()
        tree = layer(other)
        moved = tree["value"].clone()
        moved[0, 1, entry] += 1.0  # the KV head of query head 2
        tree["value"] = moved
        books.model(text, cache=other)
    change = (outs[1] - outs[0])[0, 3, 2]
    assert_close(change, weight.expand_as(change), 1e-4)


def test_answers_are_those_of_generate_and_cited_step_by_step() -> None:
    books, question = library(), ids(6, seed=9)
    settings: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 14, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    found = books.ask(question, **settings)
    want = books.model.generate(question[None], cache=books.state, **settings)
    assert found.ids == want[0, -14:].tolist() and len(found.tokens) == 14
    # The last tokens of the answer were read after the segment of 16 tokens had closed.
    assert any(s.document == CONVERSATION for s in found.tokens[-1])
    assert not any(s.document == CONVERSATION for spans in found.tokens[:10] for s in spans)
    state, steps = books.state.clone(), []
    with torch.no_grad():
        for token in want[0, :-1]:
            with retrieved() as notes:
                books.model(token[None, None], cache=state)
            steps.append(sum(float(n.weights.sum()) for n in notes) / 8)
    for index, spans in enumerate(books.cite(question, found.ids, least=0.0).tokens):
        total = sum(s.weight for s in spans)
        assert total == pytest.approx(steps[len(question) - 1 + index], rel=1e-4)


def test_a_report_and_data() -> None:
    books = library()
    found = books.ask(ids(6, seed=9), do_sample=False, max_new_tokens=5, pad_token_id=0)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["ids"] == found.ids and again["spans"][0]["document"] in BOOKS
    assert [s.weight for s in found.spans] == sorted((s.weight for s in found.spans), reverse=True)
    lines = books.report(found, limit=2).splitlines()
    best = found.spans[0]
    quoted = " ".join(map(str, BOOKS[best.document][best.start : best.end].tolist()))
    assert lines[0].startswith("answer: ") and quoted in lines[3] and best.document in lines[3]
    assert len(lines) == 3 + 2 + 2 + len(found.ids)


def test_text_goes_in_and_out() -> None:
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    model = memwrap.wrap(base, "extended_mind", segment_size=32, top_k=4)
    text = "def area(width, height):\n    return width * height\n" * 3
    books = memwrap.Library.encode(model, {"area.py": text}, tokenizer=tokenizer)
    ids_of = tokenizer(text)["input_ids"]
    kept = [n for n, i in enumerate(ids_of) if i not in tokenizer.all_special_ids]
    assert books.entries[:, 1].tolist() == kept
    found = books.ask(
        "def area(", tokenizer=tokenizer, do_sample=False, max_new_tokens=4, pad_token_id=0
    )
    report = books.report(found, tokenizer)
    assert "area.py [" in report and len(found.tokens) == len(found.ids) <= 4
    assert report.splitlines()[0] == "answer: " + " ".join(tokenizer.decode(found.ids).split())


def test_a_library_comes_back(tmp_path: Path) -> None:
    books, question = library(), ids(6, seed=9)
    books.save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "documents.safetensors", "state.safetensors",
    ]  # fmt: skip
    again = memwrap.Library.load(tmp_path, library().model)
    assert list(again.documents) == list(BOOKS)
    assert_same_states(again.state, books.state, 0.0)
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    assert again.ask(question, **settings) == books.ask(question, **settings)
    with pytest.raises(ValueError, match="other weights"):
        memwrap.Library.load(tmp_path, wrapped(
            "extended_mind", base=build("llama", seed=3), segment_size=16, cache_size=200, top_k=4,
        ))  # fmt: skip


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    books = library()
    with pytest.raises(FileNotFoundError, match="no library"):
        memwrap.Library.load(tmp_path, books.model)
    books.save(tmp_path)
    path = tmp_path / "documents.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"documents\.safetensors is damaged"):
        memwrap.Library.load(tmp_path, books.model)
    books.state.save(path)
    with pytest.raises(ValueError, match=r"documents\.safetensors is damaged or not a library"):
        memwrap.Library.load(tmp_path, books.model)
    memwrap.Library.encode(books.model, {"other": ids(9)}).save(tmp_path / "other")
    path.write_bytes((tmp_path / "other" / "documents.safetensors").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        memwrap.Library.load(tmp_path, books.model)


def test_what_cannot_be_encoded_is_named() -> None:
    model = wrapped("extended_mind")
    for documents, settings, match in (
        ({}, {}, "empty"),
        ({"a": ids(0)}, {}, "T > 0"),
        ({"a": "text"}, {}, "tokenizer"),
        ({"a": ids(9)}, {"window": 9}, "segment_size"),
        ({"a": ids(9)}, {"window": 4, "stride": 5}, "stride"),
    ):
        with pytest.raises(ValueError, match=match):
            memwrap.Library.encode(model, documents, **settings)
    with pytest.raises(ValueError, match="extended_mind"):
        memwrap.Library.encode(wrapped("infini"), {"a": ids(9)})
    with pytest.raises(ValueError, match="at least one id"):
        library().cite(ids(0), ids(3))


def test_the_policy_of_positions() -> None:
    """With "none" it does not matter where in its segment a query stands; with "zero" it does."""
    found = {}
    for positions in ("zero", "none"):
        books = library(layers=[0], positions=positions)
        question = ids(1, seed=5)
        with torch.no_grad():
            entries = []
            for before in (1, 9):
                text = torch.cat([ids(before, seed=8), question])[None]
                with retrieved() as notes:
                    books.model(text, cache=books.state.clone())
                weights = torch.zeros(4, len(books.entries))
                weights = weights.scatter(1, notes[0].entries[0, :, -1], notes[0].weights[0, :, -1])
                entries.append(weights / weights.sum(1, keepdim=True))
        found[positions] = error_of(entries[0], entries[1])
    assert found["none"] < 1e-5 < 1e-2 < found["zero"]


def test_segments_of_a_conversation_are_remembered() -> None:
    model = wrapped("extended_mind")
    state = model.read(ids(1, 3 * SEGMENT))
    assert layer(state)["count"].tolist() == [3 * SEGMENT]
