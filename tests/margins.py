"""How close tests come to what they allow.

`pytest --margins FILE` lets the shared comparisons append what they measured; this script turns
one or more such files (say, of several processors) into a table:

    python tests/margins.py FILE... [--above 0.33]

A ratio of 1 is a test that just passes. Where files disagree the larger ratio counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

VARIABLE = "MEMWRAP_TEST_MARGINS"


def record(measured: float, allowed: float, what: str = "") -> None:
    """Append one comparison to the file of `--margins`, if there is one."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    entry = {"test": test, "what": what, "measured": measured, "allowed": allowed}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def ratio(entry: dict[str, Any]) -> float:
    """Measured over allowed; an exact comparison that holds has ratio 0."""
    measured, allowed = float(entry["measured"]), float(entry["allowed"])
    if measured == 0:
        return 0.0
    return measured / allowed if allowed else math.inf


def by_file(entries: list[dict[str, Any]]) -> list[str]:
    """Rows of the table: a file's tests and comparisons, and the one that is closest."""
    files: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        files.setdefault(entry["test"].split("::")[0], []).append(entry)
    rows = ["| file | tests | comparisons | largest ratio | measured / allowed | where |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, found in sorted(files.items()):
        worst = max(found, key=ratio)
        where = f"{worst['test'].split('::')[-1]} {worst['what']}".strip()
        rows.append(
            f"| `{name.removeprefix('tests/')}` | {len({e['test'] for e in found})} | {len(found)}"
            f" | {ratio(worst):.2f} | {worst['measured']:.1e} / {worst['allowed']:.0e}"
            f" | `{where}` |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The margins of numeric tests.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--above", type=float, help="list every comparison with a larger ratio")
    arguments = parser.parse_args()
    lines = [x for f in arguments.files for x in f.read_text(encoding="utf-8").splitlines()]
    entries = [json.loads(line) for line in lines]
    if arguments.above is None:
        print("\n".join(by_file(entries)))
        return
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        key = entry["test"], entry["what"]
        if ratio(entry) > arguments.above and ratio(entry) > ratio(
            worst.get(key, {**entry, "measured": 0})
        ):
            worst[key] = entry
    for (test, what), entry in sorted(worst.items()):
        print(f"{ratio(entry):.2f} {entry['measured']:.1e}/{entry['allowed']:.0e} {test} {what}")


if __name__ == "__main__":
    main()
