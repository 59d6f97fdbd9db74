"""The evaluation room: NLL against independent computations, task rules, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

import memwrap
from memwrap.evaluation import (
    AssociativeDataset,
    AssociativeTask,
    PerplexityResult,
    evaluate_recall,
    lora_disabled,
    perplexity_by_position,
    plot_perplexity,
    plot_recall,
)
from memwrap.evaluation.controls import CURVES
from memwrap.evaluation.run import table
from memwrap.testing.families import build
from memwrap.testing.helpers import ids, wrapped


def measured(model, documents, **settings):
    return perplexity_by_position(model, documents, progress=False, **settings)


@pytest.fixture(scope="module")
def documents():
    return [ids(1, 45, seed=1)[0], ids(1, 38, seed=2)[0]]


def test_memory_and_base_curves_equal_direct_computations(documents) -> None:
    model = wrapped("armt")
    result = measured(model, documents, window=16, piece_tokens=16)
    nll, off, base = [], [], []
    for document in documents:
        with torch.no_grad():
            logits = model(input_ids=document[None]).logits[0]
            nll.append(F.cross_entropy(logits[:-1], document[1:], reduction="none"))
            empty = [model(input_ids=p[None]).logits[0] for p in document.split(8)]
            off.append(F.cross_entropy(torch.cat(empty)[:-1], document[1:], reduction="none"))
            alone = [model.backbone(input_ids=p[None]).logits[0] for p in document.split(16)]
            base.append(F.cross_entropy(torch.cat(alone)[:-1], document[1:], reduction="none"))
    for name, values in (("memory", nll), ("memory off", off), ("base, truncated", base)):
        assert result.curves[name].overall == pytest.approx(float(torch.cat(values).mean()), 1e-5)
    difference = torch.cat(off) - torch.cat(nll)
    assert result.curves["memory off"].gain == pytest.approx(float(difference.mean()), abs=1e-5)
    assert abs(result.curves["memory off"].gain) > 1e-3
    assert result.curves["memory shuffled"].overall != result.curves["memory"].overall
    first = result.curves["memory"].mean[0]
    assert first == pytest.approx(float(torch.cat([n[:7] for n in nll]).mean()), 1e-5)
    assert sum(result.curves["memory"].tokens) == 44 + 37


def test_growth_beyond_training_is_measured_plotted_and_told(documents, tmp_path) -> None:
    model = wrapped("armt")
    seen = {str(layer): float(norm) for layer, norm in _norms(model, documents[0][:16]).items()}
    model.config.trained_norms = {"armt": seen}
    result = measured(model, documents[:1], controls=(), piece_tokens=8)
    assert [at["tokens"] for at in result.norms] == [8, 16, 24, 32, 40, 45]
    for tokens, at in ((16, result.norms[1]), (45, result.norms[-1])):
        want = _norms(model, documents[0][:tokens])
        assert at["armt"] == {str(k): pytest.approx(float(v), 1e-4) for k, v in want.items()}
    layer = max(seen, key=lambda name: result._largest("armt", name) / seen[name])
    for factor, words in ((0.1, f"what 'armt' sums in layer {layer} grew to"), (10.0, None)):
        result.trained_norms = {"armt": {name: norm * factor for name, norm in seen.items()}}
        warning = result.growth()
        assert (warning is None) if words is None else (words in str(warning))
        assert ("warning" in table({"perplexity": result})) is bool(words)
    plot_perplexity(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    again = PerplexityResult.from_dict(result.to_dict())
    assert again == result
    older = result.to_dict() | {"version": 1}
    del older["norms"], older["trained_norms"]
    assert PerplexityResult.from_dict(older).growth() is None
    assert measured(wrapped("rmt"), documents, controls=()).norms == []


def _norms(model, document) -> dict:
    return model.state_norms(model.read(document[None]))["armt"]


def test_the_size_of_pieces_changes_nothing(documents) -> None:
    model = wrapped("rmt")
    small, large = (measured(model, documents, piece_tokens=n) for n in (8, 4096))
    for name in CURVES:
        assert small.curves[name].overall == pytest.approx(large.curves[name].overall, 1e-5)


def test_base_controls_run_without_lora(documents) -> None:
    plain = measured(wrapped("armt"), documents).curves
    model = wrapped("armt")
    model.add_lora(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with_lora = measured(model, documents).curves
    for name in ("base, truncated", "base, full context"):
        assert with_lora[name].overall == pytest.approx(plain[name].overall, 1e-6)
    assert abs(with_lora["memory off"].overall - plain["memory off"].overall) > 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with lora_disabled(model):
        pass
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_window_and_sinks_run_the_base_alone() -> None:
    """As wide as the documents it is the base with full context; the model is left as it was."""
    model = wrapped("armt")
    model.add_lora(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    text = ids(2, 60, seed=3)
    before = model.backbone.config._attn_implementation
    with torch.no_grad():
        logits = model(text).logits
        curves = measured(model, list(text), window=64).curves
        assert torch.equal(model(text).logits, logits)
    wide = curves["base, window + sinks"].overall
    assert wide == pytest.approx(curves["base, full context"].overall, rel=1e-5)
    assert model.backbone.config._attn_implementation == before
    narrow = measured(model, list(text), window=16).curves["base, window + sinks"].overall
    assert abs(narrow - wide) > 1e-3


def test_the_base_is_read_once(documents, monkeypatch) -> None:
    base: dict = {}
    first = measured(wrapped("armt"), documents, base=base)
    assert set(base) == {"base, truncated", "base, full context", "base, window + sinks"}
    monkeypatch.setattr("memwrap.evaluation.perplexity._windows", None)  # not called again
    monkeypatch.setattr("memwrap.evaluation.perplexity._window_and_sinks", None)
    again = measured(wrapped("armt"), documents, base=base)
    assert again.table() == first.table()


def test_results_are_files_and_tables(documents, tmp_path: Path) -> None:
    result = measured(wrapped("armt"), documents)
    again = PerplexityResult.from_dict(result.to_dict())
    assert again.table() == result.table() and "memory shuffled" in result.table()
    plot_perplexity(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no memwrap-perplexity result"):
        PerplexityResult.from_dict({"format": "other"})
    whole = result.to_dict()
    for wrong in ({"curves": 3}, {"curves": [7]}, {"curves": {"memory": {"mean": []}}}, {"x": 1}):
        with pytest.raises(ValueError, match=r"memwrap-perplexity result (is damaged|has no)"):
            PerplexityResult.from_dict(whole | wrong)
    with pytest.raises(ValueError, match="is damaged"):
        PerplexityResult.from_dict({k: v for k, v in whole.items() if k != "edges"})
    with pytest.raises(ValueError, match="at least two documents"):
        measured(wrapped("armt"), documents[:1])


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("distance", [None, 1, 5, 9])
def test_answers_are_the_last_value_of_the_key(rewrite: bool, distance: int | None) -> None:
    task = AssociativeTask(key_size=1, value_size=2, num_pairs=9, rewrite=rewrite)
    text, labels = task.sample(
        32, torch.Generator().manual_seed(0), num_queries=2, distance=distance
    )
    segments = text.view(32, -1, task.segment_size)
    queries = 1 if distance is not None else 2
    assert segments.shape[1] == 9 + queries
    for row, answers in zip(segments, labels.view(32, -1, task.segment_size), strict=True):
        keys = [int(s[0]) for s in row[:9]]
        assert rewrite or len(set(keys)) == 9
        assert all(s[1] == task.sep and s[-1] == task.eos for s in row[:9])
        for query, answer in zip(row[9:], answers[9:], strict=True):
            last = max(i for i, k in enumerate(keys) if k == int(query[0]))
            assert torch.equal(query[2:4], row[last][2:4]) and query[1] == task.gen
            assert answer.tolist() == [-100, -100, *row[last][2:4].tolist(), -100]
            assert distance is None or last == 9 - distance
        assert (answers[:9] == -100).all()


def test_rewrite_writes_keys_again() -> None:
    task = AssociativeTask(num_pairs=40, rewrite=True)
    text, _ = task.sample(4, torch.Generator().manual_seed(0))
    assert all(len(set(r[:160].view(40, 4)[:, 0].tolist())) <= 16 for r in text)


def test_recall_counts_what_greedy_generation_answers(tmp_path: Path) -> None:
    task = AssociativeTask(key_size=1, value_size=1)
    model = wrapped("armt", segment_size=task.segment_size)
    result = evaluate_recall(
        model,
        task,
        distances=(1, 3),
        samples=40,
        batch_size=16,
        controls=("memory off",),
        progress=False,
    )
    right = 0
    generator = torch.Generator().manual_seed(3)
    for rows in (16, 16, 8):
        text, _ = task.sample(rows, generator, num_pairs=3, distance=3)
        prompt = text[:, : -task.value_size - 1]
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False
        )
        right += int((out[:, -1] == text[:, -2]).sum())
    assert result.accuracy["memory"][1] == right / 40
    assert result.chance == 1 / 16 and "memory off" in result.table()
    plot_recall({"remember": result}, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert math.isclose(result.error(0.5), math.sqrt(0.25 / 40))


def test_training_rows_follow_the_curriculum() -> None:
    tasks = [AssociativeTask(num_pairs=8), AssociativeTask(num_pairs=8, rewrite=True)]
    dataset = AssociativeDataset(
        tasks, batch_size=2, max_pairs=8, num_queries=1, curriculum=[(0, 2), (3, 8)]
    )
    rows = iter(dataset)
    lengths = [len(next(rows)["input_ids"]) for _ in range(80)][::2]
    assert lengths[:3] == [12] * 3 and max(lengths) == 9 * 4
    assert torch.equal(next(iter(dataset))["labels"], next(iter(dataset))["labels"])


def test_wrong_tasks_say_so() -> None:
    with pytest.raises(ValueError, match="raise `key_size`"):
        AssociativeTask(num_pairs=17)
    with pytest.raises(ValueError, match="must agree"):
        evaluate_recall(memwrap.wrap(build("llama"), "rmt"), AssociativeTask(), progress=False)
