"""Hostile files, and writers that are killed: in processes of their own (docs/security.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
LEAST = {1: 5000, 16: 300}  # files that are tried


def output_of(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments], capture_output=True, text=True, check=False,
        timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.proof("Hostile files: refused in a sentence, or harmless", "safetensors", "faiss-cpu")
@pytest.mark.parametrize("sample", [16, pytest.param(1, marks=pytest.mark.full)])
def test_no_hostile_file_does_harm(sample: int) -> None:
    out = output_of("running.py", "--json", "--sample", str(sample))
    rows: list[Any] = json.loads(out.splitlines()[-1])
    assert len(rows) >= LEAST[sample]
    wrong = [row for row in rows if row[2] == "FAILED"]
    assert not wrong, "\n".join(" | ".join(map(str, row)) for row in wrong)


@pytest.mark.proof("SIGKILL at any moment of any writer: the old or the new, whole", "safetensors")
@pytest.mark.parametrize(
    ("kills", "by_chance"), [(3, 1), pytest.param(0, 20, marks=pytest.mark.full)]
)
def test_killed_writers_leave_whole_files(kills: int, by_chance: int) -> None:
    """Killed in front of some of its calls, or of all of them, and at random moments."""
    out = output_of("kills.py", "--kills", str(kills), "--random", str(by_chance))
    assert "| library |" in out and "| checkpoint of a training" in out


def test_folders_with_two_writers_or_none() -> None:
    assert "library: not_writable" in output_of("folders.py")
