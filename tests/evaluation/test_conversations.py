"""Conversations: what is told and asked, scores of listeners that are known, the real ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.assets import asset
from memwrap.evaluation import report, run
from memwrap.evaluation.controls import FULL, MEMORY, OFF, TRUNCATED, WINDOW
from memwrap.evaluation.conversations import (
    ConversationsResult,
    evaluate_conversations,
    examine,
    hear,
)
from memwrap.evaluation.listeners import Remembering, Rereading, bytes_per_token
from memwrap.tasks.dialogues import (
    KINDS,
    NEVER,
    ONCE,
    TAKEN_BACK,
    TOPICS,
    UPDATED,
    dialogue,
    words,
)

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def test_a_dialogue_says_what_its_questions_need() -> None:
    talk = dialogue(3, 40, topics=2, session=8)
    said = [words(turn.text) for session in talk.sessions for turn in session]
    assert [len(s) for s in talk.sessions] == [8] * 5
    assert sorted(q.kind for q in talk.questions) == sorted(KINDS * 2)

    def told(value: str | None) -> int:
        (at,) = [i for i, sentence in enumerate(said) if str(value).lower() in sentence]
        return at

    for asked in talk.questions:
        if asked.kind == NEVER:
            assert asked.value is None and asked.turns is None and asked.sessions is None
            assert not {v.lower() for v in asked.invented} & {w for s in said for w in s}
            continue
        assert asked.turns is not None and asked.value in asked.invented
        at = told(asked.value)
        if asked.kind == UPDATED:
            assert told(asked.old) < at
        if asked.kind == TAKEN_BACK:
            assert asked.turns < 40 - at
        else:
            assert (asked.turns, asked.sessions) == (40 - at, 5 - at // 8)
        for other in talk.questions:
            assert other is asked or asked.value in other.others
    assert dialogue(3, 40) == talk != dialogue(4, 40)
    values = [v for t in TOPICS for v in t.values]
    assert len(values) == len({v.lower() for v in values})
    assert all(words(v) == [v.lower()] for v in values)


class Stub:
    """A listener that answers from what it heard, in one of some ways."""

    def __init__(self, way: str) -> None:
        self.way, self.draw = way, random.Random(0)
        self.known: dict[str, list[str]] = {}  # by question: values, the newest last
        self.heard: list[str] = []
        self.sessions = 0

    def tell(self, text: str, answer: str) -> None:
        for topic in TOPICS:
            value = answer.removeprefix(f"I see. {topic.begun} ").rstrip(".")
            if answer.startswith("I see. ") and value in topic.values:
                self.known.setdefault(topic.question, []).append(value)
                self.heard.append(value)
            if "forget" in text and topic.about in text and self.way == "perfect":
                self.known.pop(topic.question)

    def end_session(self) -> None:
        self.sessions += 1

    def value(self, question: str) -> str | None:
        values = self.known.get(question, [])
        if self.way == "confabulating":
            return self.draw.choice([v for v in self.heard if v not in values])
        if self.way == "forgetful" or not values:
            return None
        return values[0] if self.way == "first" else values[-1]

    def ask(self, question: str) -> str:
        value = self.value(question)
        return "I do not know." if value is None else f"Well, it is {value.upper()}!"

    def would_say(self, question: str, answer: str, begun: str) -> bool:
        return answer.strip() == self.value(question)


@pytest.mark.parametrize(
    ("way", "named", "newest", "old", "kept_back", "leaked", "silent"),
    [
        ("perfect", 6, 6, 0, 6, 0, 6),
        ("forgetful", 0, 0, 0, 6, 0, 6),
        ("confabulating", 0, 0, 0, 6, 0, 0),  # names values of other things
        ("first", 6, 0, 6, 0, 6, 6),  # neither updates nor forgets
    ],
)
def test_the_scores_of_listeners_that_are_known(
    way: str, named: int, newest: int, old: int, kept_back: int, leaked: int, silent: int
) -> None:
    result = ConversationsResult("stub", 0, 3, 2, 8)
    for number in range(3):
        stub, talk = Stub(way), dialogue(number, 24)
        hear(stub, talk)
        assert stub.sessions == 3
        result.outcomes += examine(stub, talk, turns=24, number=number, curve=way)

    def count(kind: str, counted: str) -> tuple[int, int]:
        return result.count(24, way, kind, counted)

    assert count(ONCE, "right") == count(ONCE, "likeliest") == (named, 6)
    assert count(UPDATED, "right") == count(UPDATED, "likeliest") == (newest, 6)
    assert count(UPDATED, "old") == (old, 6)
    assert count(TAKEN_BACK, "right") == (kept_back, 6)
    assert count(TAKEN_BACK, "likeliest") == (leaked, 6)
    assert count(NEVER, "right") == (silent, 6)
    assert count(NEVER, "likeliest") == (0, 0)
    others = sum(o.other for o in result.outcomes)
    assert others == (24 if way == "confabulating" else 0)
    assert f"| told once: named | {way} | {named}/6 (" in result.table()


def tokenizer_with(template: str | None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    tokenizer.chat_template = template
    return tokenizer


def model_of(tokenizer: Any, positions: int, window: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0, max_position_embeddings=positions,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    with torch.no_grad():  # answers that depend on what is read
        for parameter in base.parameters():
            parameter *= 4
    return memwrap.wrap(base, "window", segment_size=64, window_size=window).eval()


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "plain"])
def test_readers_that_see_all_answer_alike(template: str | None, tmp_path: Path) -> None:
    """A memory that forgets nothing, kept in files between sessions, says what the base says."""
    tokenizer = tokenizer_with(template)
    model = model_of(tokenizer, 4096, 2048)
    talk = dialogue(1, 16, topics=1)
    remembering = Remembering(model, tokenizer, tmp_path)
    readers: dict[str, Any] = {MEMORY: remembering}
    readers |= {c: Rereading(model, tokenizer, c, 2048) for c in (TRUNCATED, WINDOW, FULL)}
    questions = [q.text for q in talk.questions[:2]]
    found = {}
    for name, reader in readers.items():
        hear(reader, talk)
        found[name] = [reader.ask(q) for q in questions]
        assert reader.ask(questions[0]) == found[name][0]  # nothing is remembered of a question
    assert len({tuple(answers) for answers in found.values()}) == 1, found
    state = remembering.talk.state
    assert state is not None and state.columns == len(readers[FULL].history())
    assert bytes_per_token(model) == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width


def test_the_check_without_generation_agrees_with_generation(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    model = model_of(tokenizer, 4096, 2048)
    talk = dialogue(2, 16, topics=1)
    question = talk.questions[0]
    remembering = Remembering(model, tokenizer, tmp_path)
    full = Rereading(model, tokenizer, FULL, 0)
    for reader in (remembering, full):
        hear(reader, talk)
    history, rest = full._parts(question.text)
    begun = tokenizer(question.begun, add_special_tokens=False).input_ids
    ids = torch.tensor([history + rest + begun])
    likeliest = tokenizer.decode([int(model.backbone(ids).logits[0, -1].argmax())])
    wanted = tokenizer(question.begun + likeliest, add_special_tokens=False).input_ids
    same = wanted[: len(begun)] == begun and len(wanted) == len(begun) + 1
    assert same, "the tokenizer joins the answer: take another seed"
    for reader in (remembering, full):
        assert reader.would_say(question.text, likeliest, question.begun)
        assert not reader.would_say(question.text, " violin", question.begun)


@pytest.mark.slow
def test_the_command_s_files(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    model = model_of(tokenizer, 512, 128)
    results = run.conversations(model, tokenizer, "24", 1, "tiny")
    result = results["conversations"]
    assert result.curves() == [MEMORY, OFF, TRUNCATED, WINDOW]  # all of it needs more positions
    for curve in result.curves():
        assert sorted(o.kind for o in result.outcomes if o.curve == curve) == sorted(KINDS * 2)
    state = result.state_bytes["24"]
    assert result.tokens["24"] == state // bytes_per_token(model) and state > 0
    paths = run.write(results, tmp_path)
    names = [f"conversations.{ending}" for ending in ("json", "html", "png")]
    assert [p.name for p in paths] == names
    assert all(path.stat().st_size for path in paths)
    [(_, loaded)] = report.load_result(paths[0])
    assert json.dumps(loaded.to_dict()) == json.dumps(result.to_dict())
    lines = report.rows({"a": [("", loaded)]})
    assert lines[1][:2] == ["told once: named, 24 turns", MEMORY]
    assert "told once: named" in paths[1].read_text()


def test_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have room for 6 facts"):
        dialogue(0, 8)
    with pytest.raises(ValueError, match="`topics` is 4"):
        dialogue(0, 80, topics=4)
    with pytest.raises(ValueError, match="`session` is 2"):
        dialogue(0, 80, session=2)
    tokenizer = tokenizer_with(TEMPLATE)
    model = model_of(tokenizer, 512, 128)
    with pytest.raises(ValueError, match="`turns` is 'many'"):
        run.conversations(model, tokenizer, "many", 1, "")
    with pytest.raises(ValueError, match="Unknown readers"):
        evaluate_conversations(model, tokenizer, [24], readers=("nobody",))
    with pytest.raises(ValueError, match="`dialogues` is 0"):
        evaluate_conversations(model, tokenizer, [24], dialogues=0)
    path = tmp_path / "other.json"
    path.write_text('{"format": "memwrap-conversations", "version": 0}')
    with pytest.raises(ValueError, match="no memwrap-conversations result"):
        report.load_result(path)
