"""The table of docs/ecosystem.md, from what the integration tests noted.

pytest tests/integration --record-proofs
python benchmarks/ecosystem_table.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ecosystem.json"
PAGE = ROOT / "docs" / "ecosystem.md"
MARKS = re.compile(r"(<!-- evidence:begin -->\n).*?(<!-- evidence:end -->)", re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """A row a proof: what was run, by how many tests of which file, with which versions."""
    proofs: dict[str, list[dict[str, Any]]] = {}
    for run in results.values():
        for name, about in run["proofs"].items():
            proofs.setdefault(name, []).append(about)
    rows = ["| proof | tests | ran with |", "|---|---|---|"]
    for name, runs in sorted(proofs.items()):
        versions = []
        for package in dict.fromkeys(p for run in runs for p in run["packages"]):
            seen = dict.fromkeys(run["packages"][package] for run in runs)
            versions.append(f"{package} {' and '.join(seen)}")
        rows.append(
            f"| {name} | {runs[0]['tests']} in `{runs[0]['file']}` | {', '.join(versions)} |"
        )
    pythons = sorted({run["python"] for run in results.values()})
    return "\n".join([*rows, "", f"Python {', '.join(pythons)}, two CPU cores, no GPU."])


def page(text: str, results: dict[str, Any]) -> str:
    """`text` with the table of `results` between its marks."""
    return MARKS.sub(lambda m: f"{m[1]}\n{table(results)}\n\n{m[2]}", text)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
