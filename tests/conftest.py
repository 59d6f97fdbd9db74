"""What every test runs under: one thread, fixed seeds, `full` tests only where -m names them.

Without a GPU, Triton's interpreter runs the kernels. Triton chooses it when it is first imported,
and peft, trl or torch's compiler import Triton too, so the choice is made here, before any test
module is collected. Processes that tests start do not inherit the variable.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as choice:
        choice.setenv("TRITON_INTERPRET", "1")
        import memwrap_kernels  # noqa: F401

torch.set_num_threads(1)
settings.register_profile("memwrap", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("memwrap")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the whole product of methods and families out unless it was asked for."""
    if config.getoption("markexpr", ""):
        return
    chosen = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
    items[:] = chosen


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(1234)
