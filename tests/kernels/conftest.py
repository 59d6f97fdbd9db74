"""Without a GPU the kernels run in Triton's interpreter, which `tests/conftest.py` chose."""

from __future__ import annotations

import pytest
import torch

import memwrap_kernels


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        return
    if not memwrap_kernels.interpreted():
        raise RuntimeError("triton was imported before tests/conftest.py chose its interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
