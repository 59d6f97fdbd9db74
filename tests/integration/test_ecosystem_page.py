"""docs/ecosystem.md has a row for every proof, as the tests' own record says."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

from small import ROOT

HERE = Path(__file__).parent


def marked() -> set[str]:
    """The names in all `pytest.mark.proof(...)` of this folder."""
    found = set()
    for path in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.proof":
                assert isinstance(node.args[0], ast.Constant)
                found.add(node.args[0].value)
    return found


def script() -> Any:
    path = ROOT / "benchmarks" / "ecosystem_table.py"
    spec = importlib.util.spec_from_file_location("ecosystem_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_proof_has_its_row() -> None:
    room = script()
    results = json.loads(room.RESULTS.read_text(encoding="utf-8"))
    newest = next(iter(results.values()))
    assert set(newest["proofs"]) == marked()
    text = room.PAGE.read_text(encoding="utf-8")
    assert room.page(text, results) == text, "run benchmarks/ecosystem_table.py"
    for name in marked():
        assert f"\n| {name} | " in text
