"""What every test runs under: that of the invariants, and the kernels in an interpreter.

Without a GPU, Triton's interpreter runs the kernels. Triton chooses it when it is first imported,
and peft, trl or torch's compiler import Triton too, so the choice is made here, before any test
module is collected. Processes that tests start do not inherit the variable.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# The smoke test's environment has no Triton.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    with pytest.MonkeyPatch.context() as choice:
        choice.setenv("TRITON_INTERPRET", "1")
        import memwrap_kernels  # noqa: F401

# One thread, the settings of hypothesis, and what is done with every test of the session.
from memwrap.testing.conftest import (
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    seeds,
)

__all__ = [
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "seeds",
]
