"""The demo, on a tiny random model: every part runs, and its sentences follow from its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import save_small_base
from transformers import AutoTokenizer

from memwrap.cli import demo, demo_texts

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
    small = {"WINDOW": 64, "CONTEXT": 200, "SEGMENT": 32, "ROWS": 64, "MEASURED": (200,),
             "LENGTHS": (100, 150, 300), "DOCUMENTS": (400,),
             "SETTINGS": {"segment_size": 32}}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "fetch", lambda name: folder)
    return tmp_path / "out"


def test_all_parts_run(small: Path, capsys: pytest.CaptureFixture) -> None:
    results = demo.main(small, 60)
    assert json.loads((small / "results.json").read_text()) == json.loads(json.dumps(results))
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in demo.conclusions(results))
    assert results["document"]["bytes"] == (small / "document.safetensors").stat().st_size
    assert [len(row["found"]) for row in results["document"]["questions"]] == [3, 3, 3]
    curves = [(cell["curve"], cell["length"]) for cell in results["facts"]]
    whole = [(c, n) for n in demo.LENGTHS for c in demo.CURVES if n <= 200 or c != "base, whole"]
    assert curves == whole and results["skipped"] == []
    for name in ("facts.png", "nats.png"):
        assert (small / name).stat().st_size > 1000
    page = small.parent / "README.md"
    page.write_text("# A\n<!-- demo:begin -->\nBEFORE\n<!-- demo:end -->\nZ\n")
    (small.parent / "docs" / "figures").mkdir(parents=True)
    demo.publish(small, page)
    text = page.read_text()
    assert "BEFORE" not in text and text.startswith("# A\n") and text.endswith("-->\nZ\n")
    assert "| base, whole | 0 | 0 | - |" in text and demo.conclusions(results)[2] in text
    sizes = [m["bytes"] for m in results["nats"]["memories"].values()]
    assert max(sizes) < 2 * min(sizes)


def test_a_slow_machine_is_told_what_was_left_out(
    small: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_speed", lambda *_: 0.01)
    results = demo.main(small, 0.1)
    assert results["skipped"] == [150, 300]
    assert "left out, as the time is short here: 150, 300" in capsys.readouterr().out


def test_facts_stand_where_they_are_planted() -> None:
    text = ". ".join(f"Sentence {n}" for n in range(100))
    depths = (0.1, 0.3, 0.5, 0.7, 0.9)
    planted = demo_texts.planted(text, demo_texts.PLANTED, depths).split(". ")
    for fact, depth in zip(demo_texts.PLANTED, depths, strict=True):
        place = planted.index(fact.sentence.rstrip("."))
        assert abs(place / len(planted) - depth) < 0.03
        assert fact.answer in fact.sentence and fact.answer not in fact.question
    every = [f.sentence for f in (*demo_texts.PLANTED, *demo_texts.STORY)]
    assert len({*every}) == len(every)


@pytest.mark.parametrize("best", ["window + sinks", "extended_mind"])
def test_the_sentences_follow_from_the_numbers(best: str) -> None:
    results = {
        "document": {"tokens": 24_600, "seconds": 90.2, "bytes": 1_130_000_000,
                     "questions": [{"found": [True, False, i == 2]} for i in range(3)]},
        "facts": [{"curve": "memory", "length": n, "depth": [1.0, 0.0]} for n in (2000, 7600)],
        "nats": {"memories": {name: {"mean": 2.5 if name == best else 2.75}
                              for name in ("window + sinks", "extended_mind")}},
    }  # fmt: skip
    first, second, third = demo.conclusions(results)
    assert "found 3, the base with the last 1,024 tokens 0," in first and "90 s" in first
    assert second.startswith("At 7,600 tokens 2 facts were asked for: memory 1")
    assert ("far back" in third) == (best == "window + sinks")
    assert ("0.250 nats" in third) == (best != "window + sinks")
