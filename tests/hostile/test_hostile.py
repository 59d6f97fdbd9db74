"""Hostile files, and writers that are killed: in processes of their own (docs/security.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import wrapped

from memwrap import exporting
from memwrap.stores import FaissStore

HERE = Path(__file__).parent
SLOW = partial(pytest.param, marks=pytest.mark.slow)
FULL = partial(pytest.param, marks=pytest.mark.full)
LEAST = {1: 5000, 16: 300, 160: 30}  # files that are tried


def output_of(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments], capture_output=True, text=True, check=False,
        timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.proof("Hostile files: refused in a sentence, or harmless", "safetensors", "faiss-cpu")
@pytest.mark.parametrize("sample", [160, SLOW(16), FULL(1)])
def test_no_hostile_file_does_harm(sample: int) -> None:
    out = output_of("running.py", "--json", "--sample", str(sample))
    rows: list[Any] = json.loads(out.splitlines()[-1])
    assert len(rows) >= LEAST[sample]
    wrong = [row for row in rows if row[2] == "FAILED"]
    assert not wrong, "\n".join(" | ".join(map(str, row)) for row in wrong)


@pytest.mark.slow
@pytest.mark.proof("SIGKILL at any moment of any writer: the old or the new, whole", "safetensors")
@pytest.mark.parametrize(
    ("kills", "by_chance", "only"), [(3, 1, "library"), SLOW(3, 1, ""), FULL(0, 20, "")]
)
def test_killed_writers_leave_whole_files(kills: int, by_chance: int, only: str) -> None:
    """Killed in front of some of its calls, or of all of them, and at random moments."""
    how = ("--kills", str(kills), "--random", str(by_chance), "--only", only)
    out = output_of("kills.py", *how)
    assert "| library |" in out and (only or "| checkpoint of a training" in out)


@pytest.mark.slow
@pytest.mark.proof("A full disk at any call of any writer: the old or the new", "safetensors")
@pytest.mark.parametrize(("sample", "only"), [(12, "library"), SLOW(12, ""), FULL(1, "")])
def test_a_full_disk_leaves_whole_files(sample: int, only: str) -> None:
    assert "| library |" in output_of("faults.py", "--sample", str(sample), "--only", only)


def test_files_have_the_modes_that_the_process_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.umask` is of the whole process: setting it, even for a moment, opens what other threads
    write. (safetensors writes private files, so modes are set.)"""

    def refuse(mask: int) -> int:
        raise AssertionError("the mask of the process was changed")

    model = wrapped("armt")
    store = FaissStore(4)
    store.add(torch.eye(4))
    before = os.umask(0o027)
    restore = os.umask
    try:
        monkeypatch.setattr(os, "umask", refuse)
        model.save_pretrained(tmp_path / "model")
        model.read([[5, 6, 7]]).save(tmp_path / "state.safetensors")
        store.save(tmp_path / "store")
        exporting.export(model, tmp_path / "export", check=False)
    finally:
        restore(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) > 12
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o640)}


@pytest.mark.slow
def test_folders_with_two_writers_or_none() -> None:
    assert "library: not_writable" in output_of("folders.py")
