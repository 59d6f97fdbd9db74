"""Every command that takes a model says at once that a name leads nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from commands import run


@pytest.mark.parametrize(
    "words",
    [("chat", "smolm2", "--memory", "infllm"), ("read", "smolm2", __file__, "-o", "x"),
     ("doctor", "--model", "smolm2"), ("train", "--model", "smolm2", "--data", "D"),
     ("bench", "memories", "--model", "smolm2")],
)  # fmt: skip
def test_every_command_says_so(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def silent(url: str, **options: Any) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", silent)
    monkeypatch.chdir(tmp_path)
    Path("D").mkdir()
    Path("D/a.txt").write_text("A text. " * 400)
    output = run(*words, expect=2).output
    assert "did you mean smollm2?" in output and len(asked) == 1, output
