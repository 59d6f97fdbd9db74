"""Memories of other packages: which of their code is carried along, and what is refused."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memwrap.exporting import check
from memwrap.exporting.flat import flat_files, rewritten

# Its own modules by every kind of import, memwrap's public names, and torch.
MEMORY = """
from __future__ import annotations
import math
import torch
from memwrap import MemoryConfig
from memwrap.memories.protocol import Memory
from memwrap.memories.registry import register
import carried.deep.parts as parts
from . import sizes, WIDTH
from .deep.parts import add as plus
from .deep import *
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "carried"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("WIDTH = 3\n")
    (folder / "memory.py").write_text(MEMORY)
    (folder / "sizes.py").write_text("from numpy import array\n")
    (folder / "deep" / "__init__.py").write_text("from .parts import add\n")
    (folder / "deep" / "parts.py").write_text("from ..sizes import array\ndef add(): ...\n")
    yield folder
    for module in [name for name in sys.modules if name.partition(".")[0] == "carried"]:
        del sys.modules[module]


def test_a_package_is_carried_along(package: Path) -> None:
    files = flat_files(["carried.memory"])
    own = {name for name in files if name.startswith("carried")}
    assert own == {
        "carried.py", "carried_memory.py", "carried_sizes.py", "carried_deep.py",
        "carried_deep_parts.py",
    }  # fmt: skip
    assert files["carried_memory.py"].splitlines()[1:12] == [
        "from __future__ import annotations",
        "import math",
        "import torch",
        "from .memwrap_memories_config import MemoryConfig as MemoryConfig",
        "from .memwrap_memories_protocol import Memory as Memory",
        "from .memwrap_memories_registry import register as register",
        "from .carried_deep_parts import THIS_MODULE as parts",
        "from .carried_sizes import THIS_MODULE as sizes",
        "from .carried import WIDTH as WIDTH",
        "from .carried_deep_parts import add as plus",
        "from .carried_deep import *",
    ]
    assert "from .carried_sizes import array as array" in files["carried_deep_parts.py"]
    assert (
        "from .carried_memory import THIS_MODULE as _carried_memory"
        in (files["modeling_memwrap.py"])
    )
    for text in files.values():
        ast.parse(text)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import yaml", r"\(carried\.memory\) needs the package yaml"),
        ("def f():\n    from scipy import stats", "needs the package scipy"),
        ("import carried.sizes", r"has `import carried\.sizes`"),
        ("import memwrap", "has `import memwrap`"),
        ("from memwrap import __version__", "imports __version__ from memwrap as a whole"),
        ("from . import compiled", r"carried\.compiled cannot be exported.*compiled\.so"),
    ],
)
def test_what_cannot_be_carried_says_why(package: Path, line: str, reason: str) -> None:
    (package / "compiled.so").touch()
    (package / "memory.py").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=reason):
        flat_files(["carried.memory"])


def test_a_memory_of_a_notebook_cannot_be_carried() -> None:
    with pytest.raises(ValueError, match=r"__main__ cannot be exported.*package of its own"):
        flat_files(["__main__"])


def test_two_modules_that_would_be_one_file(package: Path) -> None:
    (package / "deep_parts.py").touch()
    (package / "memory.py").write_text("from . import deep_parts\nfrom .deep import parts\n")
    with pytest.raises(ValueError, match=r"would both be exported as carried_deep_parts\.py"):
        flat_files(["carried.memory"])


def test_the_check_can_import_neither_memwrap_nor_the_package() -> None:
    blocker = check.Blocker("carried")
    for name in ("carried", "carried.deep", "memwrap.ops", "memwrap_kernels"):
        with pytest.raises(ModuleNotFoundError, match=name):
            blocker.find_spec(name)
    blocker.find_spec("torch")  # left to the other finders


def test_several_imports_in_one_line() -> None:
    new, needed = rewritten("import math, carried.x as x", "carried.y", "carried", ["carried"])
    assert new.splitlines() == ["import math", "from .carried_x import THIS_MODULE as x"]
    assert needed == ["carried.x"]
