"""The kernels as a package of their own: what Hugging Face's kernel-builder and loader ask for."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import memwrap_kernels

HERE = Path(__file__).parent
PROJECT = HERE.parents[1] / "kernels"
BUILD = tomllib.loads((PROJECT / "build.toml").read_text(encoding="utf-8"))
NAME = BUILD["general"]["name"].replace("-", "_")
PACKAGE = PROJECT / "torch-ext" / NAME
FILES = sorted(PACKAGE.glob("*.py"))

# As `kernels.get_kernel` loads a build: under its id, whatever is installed beside it.
LOAD = """
import importlib.util, sys
import torch
from pathlib import Path

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

def scanned(kernels):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
    out, state = kernels.gla.scan(q, k, v, -torch.rand(1, 2, 5), torch.zeros(1, 2, 16, 16), 0.25)
    (out.sum() + state.sum()).backward()
    return [out, state, q.grad, k.grad, v.grad]
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code], capture_output=True, text=True, check=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.slow
def test_the_package_loads_under_another_name() -> None:
    """Twice beside each other, with ops of their own, while its usual name cannot be imported."""
    code = f"""
sys.modules["memwrap_kernels"] = None
one, two = (load(name, {str(PACKAGE / "__init__.py")!r}) for name in ("_build_one", "_build_two"))
assert one.gla is not two.gla and one.gla.__name__ == "_build_one.gla"
for mine, other in zip(scanned(one), scanned(two), strict=True):
    assert torch.equal(mine, other) and bool(mine.any())
named = [hasattr(getattr(torch.ops, x), "gla") for x in ("_build_one", "_build_two")]
print(named, hasattr(torch.ops.memwrap_kernels, "gla"))
"""
    assert run(code) == "[True, True] False"


@pytest.mark.slow
def test_the_ops_keep_their_name_where_the_package_does() -> None:
    """Programs that torch.export saved name their ops."""
    code = "import memwrap_kernels\nprint(hasattr(torch.ops.memwrap_kernels, 'gla'))"
    assert run(code) == "True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_build_asks_of_a_file(path: Path) -> None:
    """Python 3.9's syntax; relative imports, else the standard library, torch and triton; ops in
    the build's namespace, told by the decorator's argument as kernel-builder tells it."""
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    for node in ast.walk(tree):
        names: list[Any] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            head = name.partition(".")[0]
            assert head in {"torch", "triton"} | sys.stdlib_module_names, f"{path.name}: {name}"
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("_op"):
                inner = decorator.args[0]
                assert isinstance(inner, ast.Call), f"{path.name} line {node.lineno}"
                assert ast.unparse(inner.func) == "add_op_namespace_prefix"


def test_the_project() -> None:
    """The layout of a project without compiled code, and version 0 until a GPU has run it."""
    general = BUILD["general"]
    assert (NAME, general["edition"], general["version"]) == ("memwrap_kernels", 5, 0)
    assert set(general) == {"name", "version", "edition", "license", "backends"}
    assert {"general", "torch-noarch"} == set(BUILD)
    assert {"build.toml", "CARD.md", "flake.nix", "torch-ext"} <= {
        p.name for p in PROJECT.iterdir()
    }
    # kernel-builder writes `_ops.py` itself and refuses to replace one.
    assert len(FILES) > 10 and PACKAGE / "_ops.py" not in FILES
    assert "No GPU has run these kernels yet" in (PROJECT / "CARD.md").read_text(encoding="utf-8")


def test_a_version_keeps_its_interface() -> None:
    """Other names need another version: record them under it, and leave what is recorded."""
    recorded = json.loads((HERE / "interface.json").read_text(encoding="utf-8"))
    interface = recorded[str(BUILD["general"]["version"])]
    assert memwrap_kernels.__file__ == str(PACKAGE / "__init__.py")
    for module, names in interface.items():
        assert importlib.import_module(module).__all__ == names, module
    submodules = {f"{NAME}.{name}" for name in interface[NAME] if (PACKAGE / f"{name}.py").exists()}
    assert submodules | {NAME} == set(interface)
    for name, recorded_names in interface.items():
        for own in recorded_names:
            assert hasattr(importlib.import_module(name), own), f"{name}.{own}"
