"""Without a GPU the kernels run in Triton's interpreter, which `tests/conftest.py` chose."""

from __future__ import annotations

import warnings

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
    # The interpreter of triton 3.6 does so. pytest takes the filter back behind the test.
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
