"""The suite: what each curve reads, scores and intervals, files and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import memwrap
from memwrap import tasks
from memwrap.assets import asset
from memwrap.evaluation import report, run, suite
from memwrap.evaluation.controls import CURVES, FULL, MEMORY, OFF, SHUFFLED
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.tasks.base import TASKS, Sample, Task


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(asset("tiny-lm"))


@pytest.fixture
def model() -> MemoryModelForCausalLM:
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    wrapped = memwrap.wrap(base, "armt", segment_size=32, num_memory_tokens=2)
    with torch.no_grad():  # a memory that changes what is read
        for parameter in wrapped.memory_parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return wrapped.eval()


class Own(Task):
    """Asks for what a model itself would say: that model is always right."""

    name, max_new_tokens = "own", 4

    def __init__(self, model: MemoryModelForCausalLM) -> None:
        self.model = model

    def sample(self, tokenizer, length, seed, *, depth=None) -> Sample:  # type: ignore[no-untyped-def]
        ids = torch.randint(10, 4000, (1, length), generator=torch.Generator().manual_seed(seed))
        said = self.model.generate(ids, max_new_tokens=4, do_sample=False)[0, length:]
        fact = (int(depth * (length - 4)), int(depth * (length - 4)) + 1)
        return Sample(ids[0].tolist(), [[fact]], length - 4, references=(tokenizer.decode(said),))


def test_the_memory_answers_as_the_model_generates(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TASKS, "own", lambda: Own(model))
    result = suite.evaluate_tasks(
        model, tokenizer, ["own"], [20, 90], samples=5, controls=(OFF, SHUFFLED, FULL),
        progress=False,
    )  # fmt: skip
    found = {(c.length, c.curve): c for c in result.cells}
    assert found[90, MEMORY].accuracy == found[20, MEMORY].accuracy == 1
    assert found[90, MEMORY].depth == [1.0] * 5
    # Shorter than a segment: nothing was remembered, so that there is nothing to take away.
    assert found[20, OFF].accuracy == found[20, SHUFFLED].accuracy == 1
    assert found[90, SHUFFLED].accuracy < 1
    assert found[90, OFF].accuracy < 1
    assert found[90, FULL].accuracy < 1


def test_answers_inside_the_text(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers are right where the whole text's logits say so, for the memory and for the base."""
    sample = tasks.task("mqar").sample(tokenizer, 80, 0)
    ids = torch.tensor([sample.ids])
    for curve, whole in ((MEMORY, model), (FULL, model.backbone)):
        likeliest = whole(input_ids=ids).logits[0].argmax(-1)
        labels = [-100] * 80
        for index, (column, _) in enumerate(sample.answers):
            labels[column] = int(likeliest[column - 1]) if index % 2 else -5
        own = Sample(sample.ids, sample.facts, sample.ask, sample.answers, labels)
        task = tasks.task("mqar")
        monkeypatch.setattr(task, "sample", lambda *a, own=own, **k: own)
        monkeypatch.setitem(TASKS, "fixed", lambda task=task: task)
        controls = () if curve == MEMORY else (FULL,)
        cells = suite.evaluate_tasks(
            model, tokenizer, ["fixed"], [80], samples=2, controls=controls, progress=False
        ).cells
        assert next(c for c in cells if c.curve == curve).accuracy == 0.5
        assert cells[0].answers == 2 * len(sample.answers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["told_facts", "passkey"])
def test_texts_read_together_are_answered_as_each_alone(
    name: str,
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of one batch say what each text says alone, and are lent the same other memory."""
    made, rows = tasks.task(name), []
    said: dict[str, float] = {}  # every text said gets a number of its own, so that none is alike
    monkeypatch.setattr(made, "score", lambda text, _: said.setdefault(text, 0.5 ** len(said)))
    monkeypatch.setitem(TASKS, name, lambda: made)
    read = model.read
    monkeypatch.setattr(model, "read", lambda ids, **k: rows.append(len(ids)) or read(ids, **k))

    def depths() -> list[tuple[str, list[float]]]:
        rows.clear()
        cells = suite.evaluate_tasks(
            model, tokenizer, [name], [127], samples=5, window=40, progress=False
        ).cells
        return [(cell.curve, cell.depth) for cell in cells]

    together = depths()
    assert [curve for curve, _ in together] == list(CURVES)
    assert name == "passkey" or max(rows) > 2
    monkeypatch.setattr(suite, "AT_ONCE", 1)
    assert depths() == together
    assert max(rows) == 1
    assert len(said) > 3


def test_sliding_windows_see_at_least_half_a_window(model: MemoryModelForCausalLM) -> None:
    ids = torch.randint(10, 4000, (1, 100))
    found, first = suite._sliding(model, ids, 41, 32)
    assert (first, len(found)) == (40, 60)
    end = 40 + 16
    logits = model.backbone(input_ids=ids[:, end - 32 : end]).logits[0]
    assert torch.equal(found[:16], logits[16:].argmax(-1))


def test_wilson() -> None:
    low, high = suite.wilson(0.5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634)
    assert suite.wilson(1.0, 20)[1] == 1.0
    assert 0.83 < suite.wilson(1.0, 20)[0] < 0.85


@pytest.mark.slow
def test_files_and_reports(
    model: MemoryModelForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    results = run.tasks(model, tokenizer, ["mqar", "passkey"], "100", 2, "tiny")
    result = results["tasks"]
    assert {c.curve for c in result.cells} == set(CURVES)
    assert all(0 <= c.low <= c.accuracy <= c.high <= 1 for c in result.cells)
    assert all(c.seconds > 0 for c in result.cells)
    paths = run.write(results, tmp_path)
    assert [p.name for p in paths] == ["tasks.json", "tasks.html"]
    page = paths[1].read_text()
    assert page.count("data:image/png;base64,") == 6  # lengths, depths, costs of two tasks
    assert "http" not in page
    loaded = report.load_result(paths[0])
    assert json.dumps(loaded[0][1].to_dict()) == json.dumps(result.to_dict())  # NaN equals NaN
    lines = report.rows({"a": loaded, "b": loaded})
    assert len(lines) == 1 + len(result.cells)
    assert lines[1][2] == lines[1][3]
    report.write_comparison(lines, tmp_path / "both.html")
    assert "passkey, 100 tokens" in (tmp_path / "both.html").read_text()


def test_wrong_input(model: MemoryModelForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'pass'"):
        run.suite_tasks("mqar,pass")
    with pytest.raises(ValueError, match="`lengths` is '10,x'"):
        run.tasks(model, None, ["mqar"], "10,x", 1, "")  # type: ignore[arg-type]
    path = tmp_path / "result.json"
    for text in ("", "[]", '{"format": "other"}', '{"format": "memwrap-suite", "version": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"result\.json"):
            report.load_result(path)
