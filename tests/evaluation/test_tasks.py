"""Tasks: lengths, seeds, the places of facts, and answers worked out anew from the text."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memwrap import tasks
from memwrap.assets import asset
from memwrap.tasks.base import Sample, fit

LENGTH = 1200
TEXT_TASKS = [n for n in tasks.available() if tasks.task(n).max_new_tokens]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(asset("tiny-lm"))


@pytest.mark.parametrize("name", tasks.available())
def test_samples(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Within the length and near it, the same for a seed, facts in front of the question."""
    made = tasks.task(name)
    one, same, other = (made.sample(tokenizer, LENGTH, seed) for seed in (1, 1, 2))
    assert one == same
    assert one.ids != other.ids
    row = one.training_row()
    assert len(row["input_ids"]) == len(row["labels"])
    answer = max(made.max_new_tokens, len(one.answer))
    assert 0.75 * LENGTH < len(one.ids) + answer <= LENGTH
    assert all(0 <= a < b <= one.ask + 1 for facts in one.facts for a, b in facts)
    if one.labels is None:
        assert one.answer
        assert row["labels"][-len(one.answer) :] == list(one.answer)
    else:
        assert len(one.answers) == len(one.facts)
        wanted = [c for c, label in enumerate(one.labels) if label != -100]
        assert wanted == sorted(c for a, b in one.answers for c in range(a, b))


@pytest.mark.parametrize("name", ["passkey", "niah_single_1", "niah_multikey_2", "threading"])
def test_facts_hold_the_answer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tasks.task(name).sample(tokenizer, LENGTH, 5)
    shown = " ".join(tokenizer.decode(sample.ids[a:b]) for a, b in sample.facts[0])
    assert all(reference in shown for reference in sample.references)


@pytest.mark.parametrize(
    "name", ["passkey", "niah_single_1", "niah_single_2_pydoc", "remember", "updates"]
)
def test_depth(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    made = tasks.task(name)
    for depth in (0.1, 0.5, 0.9):
        sample = made.sample(tokenizer, LENGTH, 3, depth=depth)
        assert abs(sample.facts[0][0][0] / sample.ask - depth) < 0.15  # whole sentences


def test_passkey_text(tokenizer: PreTrainedTokenizerBase) -> None:
    made = tasks.task("passkey")
    sample = made.sample(tokenizer, LENGTH, 0)
    text = tokenizer.decode(sample.ids, skip_special_tokens=True)
    lines = text.split("\n")
    assert len(lines) == 5
    key = sample.references[0]
    assert lines[2] == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert lines[4] == "What is the pass key? The pass key is"
    assert made.score(f" {key}. And 17", sample.references) == 1
    assert made.score(f" 17, or {key}", sample.references) == 0


def test_needle_text_is_singular_for_one(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tasks.task("niah_single_1").sample(tokenizer, LENGTH, 0)
    text = tokenizer.decode(sample.ids, skip_special_tokens=True)
    assert text.startswith("A special magic number is hidden within the following text.")
    assert text.endswith("mentioned in the provided text is")
    four = tasks.task("niah_multivalue_pydoc").sample(tokenizer, LENGTH, 0)
    assert len(four.references) == 4
    assert tasks.task("vt").score("a, B and c", ("B", "X")) == 0.5


def test_mqar(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tasks.task("mqar").sample(tokenizer, 64, 7)
    assert sample.labels is not None
    pairs = dict(zip(sample.ids[0:16:2], sample.ids[1:16:2], strict=True))
    assert len(pairs) == 8
    for (column, _), facts in zip(sample.answers, sample.facts, strict=True):
        key = sample.ids[column - 1]
        assert sample.labels[column] == pairs[key]
        assert sample.ids[facts[0][0]] == key


def test_updates(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(10):
        sample = tasks.task("updates").sample(tokenizer, 100, seed)
        last = dict(zip(sample.ids[: sample.ask : 2], sample.ids[1 : sample.ask : 2], strict=True))
        assert sample.labels is not None
        assert sample.labels[-1] == last[sample.ids[-2]]


def test_copy(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tasks.task("selective_copy").sample(tokenizer, 100, 1)
    noise = max(set(sample.ids), key=sample.ids.count)
    kept = [i for i in sample.ids[: sample.ask] if i != noise]
    assert sample.labels is not None
    assert [label for label in sample.labels if label != -100] == kept
    assert len(kept) == 16


def test_variables(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tasks.task("vt").sample(tokenizer, LENGTH, 2)
    text = tokenizer.decode(sample.ids)
    value = re.findall(r"assigned the value (\d+) in the text", text)[-1]
    known = set(re.findall(rf"VAR (\w+) = {value}\b", text))
    for name, source in re.findall(r"VAR (\w+) = VAR (\w+)", text):
        known |= {name} if source in known else set()
    assert known == set(sample.references)


def _told(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[list[list[str]], str]:
    """Sentences of the small world, as words, and the question."""
    text = tokenizer.decode(sample.ids, skip_special_tokens=True)
    people = "Mary|John|Daniel|Sandra"
    found = re.findall(rf"\b(?:{people}) (?:moved|went|journeyed|travelled|got|dropped)[^.]*", text)
    return [sentence.split() for sentence in found], text.split("Question: ")[1]


@pytest.mark.parametrize("name", ["babi_like_1", "babi_like_2", "babi_like_3"])
def test_small_worlds(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(6):
        sample = tasks.task(name).sample(tokenizer, LENGTH, seed)
        told, question = _told(tokenizer, sample)
        rooms: dict[str, str] = {}
        holder: dict[str, str] = {}
        trail: dict[str, list[str]] = {}
        for person, verb, *rest in told:
            if verb == "got":
                holder[rest[-1]] = person
                trail.setdefault(rest[-1], []).append(rooms[person])
            elif verb == "dropped":
                holder.pop(rest[-1])
            else:
                rooms[person] = rest[-1]
                for thing in [t for t, h in holder.items() if h == person]:
                    trail[thing].append(rest[-1])
        asked = question.split("?")[0].split()
        if name == "babi_like_1":
            expected = rooms[asked[-1]]
        elif name == "babi_like_2":
            expected = trail[asked[-1]][-1]
        else:
            path = trail[asked[3]]
            assert path[-1] == asked[-1]
            expected = [a for a, b in pairwise(path) if a != b][-1]
        assert sample.references == (expected,)


def test_babi_score() -> None:
    made = tasks.task("babi_like_1")
    assert made.score(" the Kitchen. Mary", ("kitchen",)) == 1
    assert made.score(" garden, kitchen", ("kitchen",)) == 0


def test_wrong_input(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="Did you mean 'passkey'"):
        tasks.task("paskey")
    with pytest.raises(ValueError, match="passkey needs at least"):
        tasks.task("passkey").sample(tokenizer, 30, 0)
    with pytest.raises(ValueError, match="mqar needs at least 32"):
        tasks.task("mqar").sample(tokenizer, 16, 0)


def test_fit_comes_close() -> None:
    sample = fit(lambda n: Sample(list(range(3 * n)), [[(0, 1)]], 0), 1000, 10, "x")
    assert len(sample.ids) == 990
