"""The invariants as a user runs them: `pytest --pyargs memwrap.testing` with its options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import memwrap
from memwrap.testing.families import FAMILIES

# With and without the entry point: an environment may have been made before there was one.
PYTEST = [sys.executable, "-m", "pytest", "-p", "memwrap_pytest", "-p", "no:cacheprovider"]
NOISY = """
import warnings, pytest

@pytest.fixture(autouse=True)
def noise():
    warnings.warn("this is noise", UserWarning)
"""


def test_every_family_is_here() -> None:
    assert {"llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2", "gpt2", "opt"} <= set(FAMILIES)


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [*PYTEST, "--pyargs", "memwrap.testing", *words],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.slow
def test_warnings_are_errors_where_no_project_says_so(tmp_path: Path) -> None:
    """The tests' own filters have the last word still; `--family` also runs what is `full`."""
    (tmp_path / "noisy.py").write_text(NOISY)
    chosen = ["-k", "test_logits_to_keep or checkpointing_changes", "--memory", "rmt"]
    chosen += ["--family", "gpt2"]
    assert re.search(r"^3 passed", run(tmp_path, "-q", *chosen), re.MULTILINE)
    noisy = run(tmp_path, "-q", "-p", "noisy", *chosen)
    assert "UserWarning: this is noise" in noisy and re.search("3 errors", noisy), noisy


@pytest.mark.slow
def test_what_is_unknown_is_said(tmp_path: Path) -> None:
    found = run(tmp_path, "--memory", "rmtt")
    assert "ERROR: Unknown memory 'rmtt'" in found and "Did you mean 'rmt'?" in found


@pytest.mark.slow
def test_what_is_long_is_slow_on_all_memories_but_few(tmp_path: Path) -> None:
    """Nothing is lost between the two; a memory that was named is tested whole."""

    def listed(*words: str) -> set[str]:
        text = run(tmp_path, "--co", "-q", "-k", "test_logits_to_keep", *words)
        return set(re.findall(r"test_logits_to_keep\[(\w+)-llama\]", text))

    few, others = listed(), listed("-m", "slow and not full")
    assert 0 < len(few) < 6 < len(others) and not few & others
    assert few | others == set(memwrap.available())
    assert "rmt" in others and listed("--memory", "rmt") == {"rmt"}
