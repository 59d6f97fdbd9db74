"""Bases that see, too, on the command line: loaded by the class that their config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLConfig

import memwrap
from memwrap.assets import asset
from memwrap.cli.small_models import small_model

FEW = ("trainer.steps=1", "trainer.accumulation=1", "trainer.device=cpu")
WINDOW = ("--memory", "window", "segment_size=16", "window_size=32")
RMT = ("--memory", "rmt", "segment_size=16", "num_memory_tokens=2")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-VL with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    config = small_model(Qwen2_5_VLConfig()).config
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_every_command_takes_one(seeing: Path, tmp_path: Path) -> None:
    document = tmp_path / "lines.txt"
    document.write_text(" ".join(f"Line {n} is here." for n in range(200)))
    state = tmp_path / "state"
    run("read", seeing, document, "-o", state, *WINDOW)
    run("chat", seeing, *WINDOW, "--state", state, "--max-new-tokens", "2", "--ask", "Line 3:")
    run("train", "--model", seeing, "--data", document, *RMT, *FEW, "-o", tmp_path / "tuned")
    model = memwrap.load(tmp_path / "tuned")
    assert type(model.backbone).__name__ == "Qwen2_5_VLForConditionalGeneration"
    run("export", seeing, tmp_path / "out", *RMT)  # loads it without memwrap and compares
