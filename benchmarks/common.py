"""What the benchmark scripts share: the machine's description, timing in pairs, results."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memwrap.evaluation.measure import machine

RESULTS = Path(__file__).parent / "results"


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time functions in turn, so that a noisy machine disturbs all of them alike."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "q1": quartiles[0], "q3": quartiles[2]}


def save(name: str, values: dict[str, Any]) -> None:
    """Write `results/NAME.json` with the machine described, and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"benchmark": name, "machine": machine(), **values}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text if len(text) < 4000 else f"wrote {name}.json")
