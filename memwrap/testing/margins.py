"""How close numeric tests come to what they allow.

With `MEMWRAP_TEST_MARGINS=FILE` in the environment the shared comparisons append what they measured
to that file, `torch.testing.assert_close` too; this module turns files, say those of several
settings of a processor, into a table of the largest ratios:

    python -m memwrap.testing.margins FILE... [--above 0.33]

A ratio of 1 is a comparison that just passes. Of several files the larger ratio counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VARIABLE = "MEMWRAP_TEST_MARGINS"
Entry = dict[str, Any]


def record(measured: float, allowed: float, label: str = "") -> None:
    """Append one comparison to the file that the environment names, if it names one.

    Args:
        measured, allowed: in the same unit, whatever it is.
        label: the compared tensor.
    """
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    entry = {"test": test, "label": label, "measured": measured, "allowed": allowed}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def recording(compare: Callable[..., None]) -> Callable[..., None]:
    """Wrap `torch.testing.assert_close`: the largest part of what its tolerances allow."""

    def wrapper(actual: Any, expected: Any, **options: Any) -> None:
        both = isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor)
        if both and expected.is_floating_point() and actual.shape == expected.shape:
            defaults = torch.testing._comparison.default_tolerances(actual, expected)
            rtol, atol = options.get("rtol", defaults[0]), options.get("atol", defaults[1])
            rtol, atol = defaults if rtol is None or atol is None else (rtol, atol)
            wanted = expected.detach().double()
            error = (actual.detach().double() - wanted).abs()
            allowed = atol + rtol * wanted.abs()
            ratio = torch.where(error == 0, 0.0, error / allowed)
            record(float(ratio.max()) if ratio.numel() else 0.0, 1.0, "assert_close")
        compare(actual, expected, **options)

    return wrapper


def install() -> None:
    """Let `torch.testing.assert_close` record as well, where recording is on."""
    if os.environ.get(VARIABLE) is not None:
        torch.testing.assert_close = recording(torch.testing.assert_close)


def ratio_of(entry: Entry) -> float:
    """Divide measured by allowed; an exact comparison that holds has ratio 0."""
    measured, allowed = float(entry["measured"]), float(entry["allowed"])
    if measured == 0:
        return 0.0
    return measured / allowed if allowed else math.inf


def worst_of(entries: list[Entry]) -> dict[tuple[str, str], Entry]:
    """Find the closest comparison of every tensor of every test."""
    worst: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        key = entry["test"], entry["label"]
        if key not in worst or ratio_of(entry) > ratio_of(worst[key]):
            worst[key] = entry
    return worst


def table(entries: list[Entry]) -> list[str]:
    """Make a row for each file: its tests, its comparisons, and the closest of them."""
    files: dict[str, list[Entry]] = {}
    for (test, _), entry in worst_of(entries).items():
        files.setdefault(test.split("::")[0], []).append(entry)
    rows = ["| tests | number | comparisons | closest: measured / allowed | ratio |",
            "|---|---|---|---|---|"]  # fmt: skip
    for name, comparisons in sorted(files.items()):
        worst, tests = max(comparisons, key=ratio_of), {e["test"] for e in comparisons}
        numbers = f"{worst['measured']:.1e} / {worst['allowed']:.1e}"
        rows.append(
            f"| `{name}` | {len(tests)} | {len(comparisons)} | {numbers} | {ratio_of(worst):.2f} |"
        )
    return rows


def main() -> None:
    """Print the table, or what is above a ratio."""
    parser = argparse.ArgumentParser(description="The margins of numeric tests.")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--above", type=float, help="list every comparison above this ratio")
    arguments = parser.parse_args()
    lines = [x for f in arguments.files for x in f.read_text(encoding="utf-8").splitlines()]
    entries = [json.loads(line) for line in lines]
    if arguments.above is None:
        print("\n".join(table(entries)))
        return
    for (test, label), entry in sorted(worst_of(entries).items()):
        if ratio_of(entry) > arguments.above:
            numbers = f"{entry['measured']:.1e} / {entry['allowed']:.1e}"
            print(f"{ratio_of(entry):.2f}  {numbers}  {test}  {label}")


if __name__ == "__main__":
    main()
