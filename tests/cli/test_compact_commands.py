"""`memwrap train cartridge` and `memwrap eval --task head-budgets`, end to end on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run

TEXT = "def area(width, height):\n    return width * height\n\n\n" * 8


def test_a_cartridge_is_trained_and_asked(base: Path, tmp_path: Path) -> None:
    document = tmp_path / "shapes.md"
    document.write_text(TEXT)
    small = ["slots=10", "segment_size=32"]
    output = run(
        "train", "cartridge", "--model", base, "--document", document, "-o", tmp_path / "out",
        *small, "steps=2", "talks=3", "held_out=1", "chunk_tokens=20", "question_tokens=4",
        "answer_tokens=4", "temperature=1.5", "batch=2",
    ).output  # fmt: skip
    about = json.loads((tmp_path / "out" / "cartridge.json").read_text())
    assert about["steps"] == 2 and about["memory"]["segment_size"] == 32
    assert set(about["nats"]) == {"full", "compaction", "start", "no document", "trained"}
    # The last line is the command that asks it.
    words = output.strip().splitlines()[-1].split()
    assert words[:2] == ["memwrap", "chat"]
    asked = run(*words[1:], "--ask", "area", "--max-new-tokens", 3).output
    assert asked.strip()


@pytest.mark.slow
def test_cartridges_and_budgets_need_what_they_need(base: Path, tmp_path: Path) -> None:
    assert "--document" in run("train", "cartridge", "--model", base, expect=2).output
    words = ["eval", base, "--task", "head-budgets", "--tokens", 60, "--count", 1, "-o", tmp_path]
    assert "compact" in run(*words, "--memory", "window", expect=2).output
    run(*words, "--memory", "compact", "slots=4", "segment_size=32")
    shares = json.loads((tmp_path / "head-budgets.json").read_text())["shares"]
    assert len(shares) == 4 and abs(sum(shares.values()) - 1) < 1e-9
