"""Needles in long texts: what the texts are, what is counted as right, and the heat map."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from support import wrapped
from torch import Tensor
from transformers import AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation import NeedleResult, NeedleTask, evaluate_needles, plot_needles
from memwrap.evaluation.needles import TASKS
from memwrap.evaluation.perplexity import CURVES, FULL, MEMORY, TRUNCATED, WINDOW

LEGEND = "There is an important info hidden inside a lot of irrelevant text."


class Letters:
    """A tokenizer of single characters: lengths and places can be counted by hand."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def text_of(tokenizer: Any, ids: Tensor) -> str:
    return tokenizer.decode(ids.tolist())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tokenizer", ["letters", "tiny-lm"])
def test_samples_fit_and_say_where_things_are(name: str, tokenizer: str) -> None:
    own: Any = (
        Letters() if tokenizer == "letters" else AutoTokenizer.from_pretrained(asset("tiny-lm"))
    )
    task = NeedleTask(name, own)
    for length in (700, 1500):
        for depth in (0.0, 0.3, 1.0):
            sample = task.sample(length, depth, random.Random(3))
            # The longest text that fits: one more unit of filler would not.
            assert length - 120 < len(sample.ids) <= length
            needle = text_of(own, sample.ids[slice(*sample.needle)])
            assert sample.expected in needle
            assert text_of(own, sample.ids[sample.answer :]).strip() == sample.expected
            question = text_of(own, sample.ids[sample.question : sample.answer])
            assert question.strip().startswith("What is the") and question.rstrip().endswith("is")
            start, stop = sample.needle
            head = task.sample(length, 0.0, random.Random(3)).needle[0]
            place = (start - head) / max(1, sample.question - (stop - start) - head)
            # To half a line of the haystack, which is long beside the shortest of these texts.
            assert place == pytest.approx(depth, abs=0.11)


def test_the_passkey_text_is_the_published_one() -> None:
    sample = NeedleTask("passkey", Letters()).sample(600, 0.5, random.Random(0))
    lines = text_of(Letters(), sample.ids).split("\n")
    assert len(lines) == 5 and lines[0].startswith(LEGEND)
    key = sample.expected
    assert lines[2] == f"The pass key is {key}. Remember it. {key} is the pass key."
    assert lines[4] == f"What is the pass key? The pass key is {key}"
    unit = "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    assert lines[1].startswith(unit) and lines[3].startswith(unit)
    assert abs(len(lines[1]) - len(lines[3])) <= 1


def test_other_keys_surround_the_one_that_is_asked_for() -> None:
    sample = NeedleTask("multikey_2", Letters()).sample(4000, None, random.Random(1))
    text = text_of(Letters(), sample.ids)
    pairs = re.findall(r"magic numbers for ([a-z-]+) is: (\d{7})\.", text)
    (asked,) = re.findall(r"number for ([a-z-]+) mentioned in the provided text\?", text)
    assert len(pairs) > 40
    assert [value for key, value in pairs if key == asked] == [sample.expected]


def test_samples_are_the_same_for_one_seed() -> None:
    task = NeedleTask("single_1", Letters())
    drawn = [task.sample(900, None, random.Random(s)).ids for s in (4, 4, 5)]
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].tolist() != drawn[2].tolist()
    assert torch.equal(task.sample(900).ids, NeedleTask("single_1", Letters()).sample(900).ids)


def needle_model() -> Any:
    """A random model over characters: chance level, but every curve can be measured."""
    base = build("llama")
    base.config.max_position_embeddings = 256
    return memwrap.wrap(base, "infllm", segment_size=32, window_size=64, num_sinks=4,
                        block_size=8, top_k=4, num_representatives=2)  # fmt: skip


def test_every_curve_is_measured_and_drawn(tmp_path: Path) -> None:
    result = evaluate_needles(
        needle_model(), NeedleTask("passkey", Letters()), lengths=(450, 600),
        depths=(0.0, 1.0), samples=2, window=100, full_context_tokens=500, progress=False,
    )  # fmt: skip
    assert list(result.accuracy) == list(CURVES)
    for name, rows in result.accuracy.items():
        for length, row in zip(result.lengths, rows, strict=True):
            measured = name != FULL or length <= 500
            assert all((v is not None and 0 <= v <= 1) == measured for v in row), name
    assert 440 < result.tokens[0] <= 450 < result.tokens[1] <= 600
    lines = result.table().splitlines()
    assert len(lines) == 2 + len(CURVES) and lines[0].startswith("| passkey, tokens | 450 | 600 |")
    assert lines[2 + CURVES.index(FULL)].endswith("| - |")
    result.save(tmp_path / "needles.json")
    assert (tmp_path / "needles.json").read_text().startswith('{\n  "format": "memwrap-needles"')
    plot_needles(result, tmp_path / "needles.png")
    assert (tmp_path / "needles.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("wrong", [None, "digit", "more"])
def test_what_counts_as_right(wrong: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the answers is right, one that goes on with a digit is not."""
    task = NeedleTask("passkey", Letters())

    def told(model: Any, texts: list[Any], curves: list[str], *_: Any) -> dict[str, list[Tensor]]:
        logits = []
        for sample in texts:
            best = [*sample.ids[sample.answer :].tolist(), ord("7" if wrong == "more" else ".")]
            if wrong == "digit":
                best[-2] = ord("x")
            logits.append(torch.nn.functional.one_hot(torch.tensor(best), 128).float())
        return {name: logits for name in curves}

    monkeypatch.setattr("memwrap.evaluation.retrieval._logits", told)
    result = evaluate_needles(
        needle_model(), task, lengths=(450,), depths=(0.5,), samples=2, progress=False
    )
    assert result.accuracy[MEMORY] == [[0.0 if wrong else 1.0]]
    assert result.mean(MEMORY, 0) == result.accuracy[MEMORY][0][0]


@torch.no_grad()
def test_answers_are_read_off_the_right_places() -> None:
    """Logits are those of the state, and of the backbone alone, behind the right tokens."""
    from memwrap.evaluation.retrieval import _logits

    model, task = needle_model(), NeedleTask("passkey", Letters())
    texts = [task.sample(n, 0.5, random.Random(n)) for n in (430, 400)]
    curves = [MEMORY, TRUNCATED, FULL, WINDOW]
    found = _logits(model, texts, curves, 100, 1000)
    for index, sample in enumerate(texts):
        state = model.close_segment(model.read(sample.ids[: sample.question]))
        want = model(sample.ids[None, sample.question :], past_key_values=state).logits[0]
        want = want[sample.answer - sample.question - 1 :]
        torch.testing.assert_close(found[MEMORY][index], want, rtol=0, atol=1e-3)
        assert len(found[MEMORY][index]) == len(sample.ids) - sample.answer + 1
        for name, last in ((TRUNCATED, 100), (FULL, 1000)):
            whole = model.backbone(sample.ids[None, -last:]).logits[0]
            torch.testing.assert_close(found[name][index], whole[-len(want) :], rtol=0, atol=1e-3)
        assert found[WINDOW][index].shape == want.shape


def test_wrong_requests() -> None:
    task = NeedleTask("passkey", Letters())
    with pytest.raises(ValueError, match=r"single_2.*passkey"):
        NeedleTask("single_2", Letters())
    with pytest.raises(ValueError, match="shortest passkey text has"):
        task.sample(100)
    with pytest.raises(ValueError, match=r"1\.5.*between 0 and 1"):
        task.sample(600, 1.5)
    model = wrapped("rmt")
    with pytest.raises(ValueError, match="at least two samples"):
        evaluate_needles(model, task, samples=1)
    with pytest.raises(ValueError, match=r"Unknown controls.*guess"):
        evaluate_needles(model, task, controls=("guess",))


def test_means_leave_out_what_was_not_measured() -> None:
    result = NeedleResult("passkey", [10], [0.0, 1.0], 4, 8, {MEMORY: [[0.5, None]]})
    assert result.mean(MEMORY, 0) == 0.5
    assert NeedleResult("passkey", [10], [0.0], 4, 8, {MEMORY: [[None]]}).mean(MEMORY, 0) is None
