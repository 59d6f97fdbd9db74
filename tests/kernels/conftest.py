"""Without a GPU the kernels run in Triton's interpreter, which is chosen at their first import.

The variable is set for that import and while these tests run: processes that other tests start
do not inherit it.
Nothing else in the tests imports the kernels before (they are imported where they are used).
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    already = "memwrap_kernels" in sys.modules
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import memwrap_kernels

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
    if not memwrap_kernels.interpreted():
        raise RuntimeError(f"memwrap_kernels was imported too early (before: {already})")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
