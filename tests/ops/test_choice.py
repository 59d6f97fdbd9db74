"""Which implementation an op takes: by default, by choice, and what cannot be chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memwrap.ops import backend, current_backend

ROOT = Path(__file__).parents[2]


def test_tensors_on_the_cpu_take_torch() -> None:
    assert current_backend() == current_backend(torch.zeros(1)) == "torch"
    with (
        pytest.raises(ValueError, match="allowed: auto, naive, torch, triton, fla"),
        backend("cuda"),
    ):
        pass


def test_tensors_on_a_gpu_take_the_kernels() -> None:
    pytest.importorskip("triton")
    there: Any = SimpleNamespace(device=torch.device("cuda"))
    assert current_backend(there) == "triton"
    assert current_backend(there, "a reason") == "torch"
    for name in ("naive", "torch"):
        with backend(name):
            assert current_backend(there) == name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels may be chosen")
@pytest.mark.parametrize(
    ("interpret", "hide", "words"),
    [
        ("0", "", "need a GPU"),
        ("1", "", "chosen: triton"),
        ("1", "triton", "not installed"),
    ],
)
def test_choosing_the_kernels(interpret: str, hide: str, words: str) -> None:
    """A process of its own: the interpreter is chosen when the kernels are first imported."""
    code = (
        "import sys\n"
        f"if {hide!r}: sys.modules[{hide!r}] = None\n"
        "import torch\n"
        "from memwrap.ops import backend, current_backend\n"
        "try:\n"
        "    with backend('triton'): print('chosen:', current_backend(torch.zeros(1)))\n"
        "except ValueError as error: print(error)\n"
        "assert current_backend(torch.zeros(1)) == 'torch'\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": path},
    )  # fmt: skip
    assert words in done.stdout


@pytest.mark.slow
def test_the_kernels_stand_alone() -> None:
    """`memwrap_kernels` needs torch and triton, and nothing of memwrap or transformers."""
    code = (
        "import sys, memwrap_kernels\n"
        "print(sorted({'memwrap', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels" / "torch-ext")},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
