"""The examples in the docstrings of the public names run as they stand."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import memwrap

METHODS = ("read", "generate", "close_segment")
FUNCTIONS = ("available", "config_class", "linearize", "load", "pipeline", "unwrap", "wrap")
PUBLIC = {name: getattr(memwrap, name) for name in memwrap.__all__ if not name.startswith("__")}
SHOWN: dict[str, Any] = {
    **{name: PUBLIC[name] for name in (*FUNCTIONS, "Library", "MemoryState")},
    **{n: o for n, o in PUBLIC.items() if inspect.isclass(o) and n.endswith("Config")},
    **{name: getattr(memwrap.MemoryModelForCausalLM, name) for name in METHODS},
}
del SHOWN["MemoryModelConfig"]  # made by `wrap`


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(SHOWN[name]) or ""
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert test.examples, f"{name} shows no example"
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not result.failed, "".join(report)
