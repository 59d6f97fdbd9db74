"""Proofs in the ecosystem: each marked test says what it shows and with which packages.

`pytest tests/integration --record-proofs` notes in benchmarks/results/ecosystem.json what passed
with which versions; `python benchmarks/ecosystem_table.py` writes the table of docs/ecosystem.md.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ecosystem.json"
ALWAYS = ("torch", "transformers")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-proofs", action="store_true", help="write ecosystem.json")


@pytest.fixture(autouse=True)
def one_thread_and_its_proof(request: pytest.FixtureRequest) -> None:
    """The proof travels with the report, also from a worker process."""
    for mark in request.node.iter_markers("proof"):
        about = {"proof": mark.args[0], "packages": [*ALWAYS, *mark.args[1:]]}
        request.node.user_properties.append(("proof", json.dumps(about)))


class Recorder:
    """Collects what passed; runs where the reports come together."""

    def __init__(self) -> None:
        self.passed: dict[str, dict] = {}
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, value in report.user_properties:
            if key != "proof":
                continue
            about = json.loads(value)
            if report.outcome != "passed":
                self.failed.add(about["proof"])
            elif report.when == "call":
                known = self.passed.setdefault(about["proof"], {"packages": {}, "tests": 0})
                known["tests"] += 1
                known["file"] = report.nodeid.partition("::")[0]
                known["packages"] |= {
                    name: importlib.metadata.version(name).partition("+")[0]
                    for name in about["packages"]
                }

    def pytest_sessionfinish(self) -> None:
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        key = f"transformers {importlib.metadata.version('transformers')}"
        run = results.setdefault(key, {"python": "", "proofs": {}})
        run["python"] = platform.python_version()
        for name in self.failed:
            run["proofs"].pop(name, None)
        run["proofs"] |= {n: v for n, v in self.passed.items() if n not in self.failed}
        run["proofs"] = dict(sorted(run["proofs"].items()))
        text = json.dumps(dict(sorted(results.items(), reverse=True)), indent=1) + "\n"
        RESULTS.write_text(text, encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    if config.getoption("--record-proofs", False) and not worker:
        config.pluginmanager.register(Recorder(), "proofs")
