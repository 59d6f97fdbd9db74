"""The demo, on a tiny random model: every part runs, and its sentences follow from its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import save_small_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.chat import read_document
from memwrap.cli import demo, demo_readers, demo_report, demo_texts, demo_trained
from memwrap.cli.demo_readers import BaseReader, MemoryReader
from memwrap.tasks.invented import FACTS, FURTHER, Fact

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = save_small_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    small = {"BASES": {"base, truncated": 64, "base, whole": -500}, "CONTEXT": 500,
             "SEGMENT": 32, "ROWS": 64, "MEASURED": (200,), "LOOKS": 600,
             "LENGTHS": (100, 150, 700), "LONGER": (),
             "READING": {"segment_size": 32, "window_size": 64, "block_size": 16, "top_k": 2},
             }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "fetch", lambda name: folder)
    monkeypatch.setattr(demo_trained, "ADAPTER", "none")  # the shipped one is of another base
    return tmp_path / "out"


@pytest.mark.slow
def test_all_parts_run(
    small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[tuple[str, int], int] = {}
    count = demo._count

    def noted(run: demo.Run, reader: Any, curve: str, length: int, facts: Any) -> None:
        read[curve, length] = getattr(reader, "length", 0)
        count(run, reader, curve, length, facts)

    monkeypatch.setattr(demo, "_count", noted)
    results = demo.main(small, 60)
    whole = [read["base, whole", n] for n in demo.LENGTHS]
    assert whole == sorted(whole) and whole[-1] < 550, whole  # what the context holds
    assert all(read["base, truncated", n] < 110 for n in demo.LENGTHS)
    assert json.loads((small / "results.json").read_text()) == json.loads(json.dumps(results))
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in demo_report.conclusions(results))
    assert results["document"]["bytes"] == (small / "document.safetensors").stat().st_size
    assert [len(row["answers"]) for row in results["document"]["questions"]] == [3, 3, 3]
    cells = {(cell["curve"], cell["length"]) for cell in results["facts"]}
    every = {(curve, n) for n in demo.LENGTHS for curve in demo_report.CURVES}
    assert cells == every - {("window + sinks", 100), ("window + sinks", 150)}
    assert len(cells) == len(results["facts"]) and results["skipped"] == []
    for name in ("facts.png", "nats.png"):
        assert (small / name).stat().st_size > 1000
    page = small.parent / "README.md"
    page.write_text("# A\n<!-- demo:begin -->\nBEFORE\n<!-- demo:end -->\nZ\n")
    (small.parent / "docs" / "figures").mkdir(parents=True)
    demo_report.publish(small, page)
    text = page.read_text()
    assert "BEFORE" not in text and text.startswith("# A\n") and text.endswith("-->\nZ\n")
    assert "| window + sinks | - | - |" in text and demo_report.conclusions(results)[2] in text
    assert "demo_nats.png" in text
    best = min(m["mean"] for m in results["nats"]["memories"].values())
    assert ("take a memory" in demo_report.conclusions(results)[2]) == (
        results["nats"]["memories"]["window + sinks"]["mean"] == best
    )
    sizes = [m["bytes"] for m in results["nats"]["memories"].values()]
    assert max(sizes) < 2 * min(sizes)


def test_what_fits_in_context_is_known_to_all_readers_alike(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory that sees the whole text is asked what the base is asked, in one pass and by
    `generate`; asking leaves both as they were."""
    folder = demo.fetch("smollm2")
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts, fact = demo_texts.parts(tokenizer, (40, 60)), demo_texts.FACTS[0]
    given: list[tuple] = []
    monkeypatch.setattr(demo_readers, "_first_choices", lambda *seen: bool(given.append(seen)))
    plain = BaseReader(base, tokenizer, "\n\n".join(parts.texts), 10_000)
    asked = []
    for _ in range(2):
        plain.knows(fact)
        asked.append(plain.ask(demo_texts.question(fact)))
    model = memwrap.wrap(base, "window", segment_size=5000, window_size=5000).eval()
    state = None
    for text in parts.texts:
        state = read_document(model, tokenizer, text, state)
    memory = MemoryReader(model, tokenizer, state)
    memory.knows(fact)
    asked.append(memory.ask(demo_texts.question(fact)))
    assert asked == asked[:1] * 3
    for logits, ids, count in given:
        assert tokenizer.decode(ids[-count:]).strip() == fact.answer
        torch.testing.assert_close(logits[-count - 1 :], given[0][0][-count - 1 :])


def test_a_first_choice_is_the_most_likely_token_at_each_place() -> None:
    logits = torch.eye(6)[[3, 1, 4, 0]]
    assert demo_readers._first_choices(logits, [9, 1, 4], 2)  # chosen by the two rows before
    assert not demo_readers._first_choices(logits, [9, 1, 0], 2)


@pytest.mark.slow
def test_a_trained_memory_is_shown_where_one_is_shipped_and_its_training_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    monkeypatch.setattr(demo_trained, "ADAPTER", "none")
    assert demo_trained.trained(base, tokenizer) is None
    monkeypatch.setattr(demo_trained, "ADAPTER", "armt-lm")
    monkeypatch.setattr(demo_trained, "SAMPLES", 2)
    monkeypatch.setattr(demo_trained, "SEGMENTS", (3,))
    shorter = ("model.name=tiny-lm", "tasks.min_tokens=95", "tasks.curriculum=null",
               "trainer.batch_size=2", "trainer.steps=1", "trainer.warmup_steps=0",
               "start.segments=4")  # fmt: skip
    monkeypatch.setattr(demo_trained, "CHANGES", shorter)
    # without armt-lm's LoRA
    plain = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    monkeypatch.setattr(
        demo, "trained_anew", lambda _, *given: demo_trained.trained_anew(plain, *given)
    )
    run = demo.Run(tmp_path, 3, tokenizer, 1, results={"parts": {}})
    demo._measure_trained(run, base)
    demo._tell_trained(run)
    demo._train(run, base)
    demo._tell_training(run)
    training = run.results["training"]
    assert training["steps"] == training["planned"] == 1 and 0 <= training["known"] <= 1
    curves = run.results["trained"]["curves"]
    assert list(curves) == ["memory", *demo_trained.CONTROLS]
    assert all(0 <= share <= 1 for shares in curves.values() for share in shares.values())
    printed = capsys.readouterr().out
    assert "memory shuffled" in printed and demo_trained.said_of(training) in printed


@pytest.mark.slow
def test_a_slow_machine_is_told_what_was_left_out(
    small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_speed", lambda *_: 0.01)
    results = demo.main(small, 0.1)
    assert {length for _, length in results["skipped"]} == {700}
    assert "memory at 700" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("longer", "told", "tolerance"),
    # Depths count sentences, and the few very long ones of the manual come late.
    [((), FACTS, 0.06), (demo.LONGER, (*FACTS, *FURTHER), 0.1)],
    ids=["usual", "longer"],
)
def test_facts_stand_where_they_are_planted(
    longer: tuple[int, ...], told: tuple[Fact, ...], tolerance: float
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    parts = demo_texts.parts(tokenizer, (2000, 8000, 16000, *longer))
    for index, (length, facts) in enumerate(zip(parts.lengths, parts.facts, strict=True)):
        document = "\n\n".join(parts.texts[: index + 1])
        assert abs(len(tokenizer(document).input_ids) / length - 1) < 0.1
        for fact, depth in zip(facts, demo_texts.depths(len(facts)), strict=True):
            assert document.count(fact.sentence) == 1
            assert abs(document.index(fact.sentence) / len(document) - depth) < tolerance
    sentences = [fact.sentence for facts in parts.facts for fact in facts]
    assert sorted(sentences) == sorted({fact.sentence for fact in told})
    for fact in told:
        assert fact.sentence.count(fact.answer) == 1 and fact.answer not in fact.question


@pytest.mark.parametrize("best", ["window + sinks", "extended_mind"])
def test_the_sentences_follow_from_the_numbers(best: str) -> None:
    found = {"memory": (9, 9, 8), "base, truncated": (5, 1, 0), "base, whole": (9, 6, 2),
             "window + sinks": (None, 4, 3)}  # fmt: skip
    results = {
        "settings": {"truncated": 1_024, "context": 8_064, "looks": 2_560, "entries": 512},
        "document": {"tokens": 16_010, "seconds": 90.2, "bytes": 1_130_000_000},
        "facts": [{"curve": curve, "length": n, "depth": [1.0] * count + [0.0] * (10 - count)}
                  for curve, counts in found.items()
                  for n, count in zip(demo.LENGTHS, counts, strict=True) if count is not None],
        "nats": {"memories": {name: {"mean": 2.5 if name == best else 2.75, "bytes": size}
                              for name, size in (("window + sinks", 35_400_000),
                                                 ("extended_mind", 52_600_000))}},
    }  # fmt: skip
    first, second, third = demo_report.conclusions(results)
    assert "the memory found 8, the base with all that its context holds 2, with" in first
    assert "in 90 s" in first and "9 at 2,000, 9 at 8,000, 8 at 16,000 tokens" in second
    assert "sinks 4 at 8,000, 3 at 16,000; from" in second and second.endswith("the memory lost 1.")
    assert ("far back" in third) == (best == "window + sinks")
    assert ("0.250 nats" in third) == (best != "window + sinks")
    assert best == "window + sinks" or ("(53 MB)" in third and "(35 MB)" in third)
    del results["nats"]
    assert demo_report.conclusions(results)[:2] == [first, second]
    assert "cut short" in demo_report.conclusions(results)[2]
