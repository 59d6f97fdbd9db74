"""A tiny random model on disk, for the commands that take one."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import save_small_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_base(tmp_path_factory.mktemp("base") / "llama")
