"""The dtype in which a half-precision checkpoint is loaded on a CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from memwrap.model import cpu_dtype
from memwrap.model.opening import open_model
from memwrap.testing.families import build


def test_the_measurement_is_a_ratio() -> None:
    assert 0 < cpu_dtype.slowness(torch.bfloat16) < 1e3
    assert cpu_dtype.slowness(torch.bfloat16) == cpu_dtype.slowness(torch.bfloat16)  # once


@pytest.mark.parametrize("times", [1.2, 3.4])
def test_a_half_checkpoint_is_loaded_in_what_is_quick(
    times: float, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(cpu_dtype, "slowness", lambda dtype: times)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cpu_dtype.logger.warning_once.cache_clear()
    settings = {"segment_size": 8}
    with caplog.at_level(logging.WARNING):
        model = open_model(tmp_path / "base", "window", settings)
    assert model.dtype == (torch.bfloat16 if times < 1.5 else torch.float32)
    own = open_model(tmp_path / "base", "window", settings, dtype=torch.bfloat16)
    assert own.dtype == torch.bfloat16
    own.save_pretrained(tmp_path / "saved", include_base=True)
    assert open_model(tmp_path / "saved").dtype == torch.bfloat16  # as its states are
