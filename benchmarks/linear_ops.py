"""Gated linear attention, the delta rule and gated slots on a CPU, against the specification.

python benchmarks/linear_ops.py

4,096 tokens of one row, head width 64, float32, one thread. Times are of the processor, so that
other work on the machine hardly shows in the ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor

from memwrap.ops import backend, delta, gla, gsa

TOKENS, WIDTH = 4_096, 64
HEADS = (1, 2, 8)
Scan = Callable[..., Any]


def forms(heads: int) -> dict[str, Scan]:
    """Every form as a function of queries, keys and values."""
    rows = (1, heads, TOKENS)
    wide = F.logsigmoid(torch.randn(*rows, WIDTH)) / 16
    narrow, beta = wide[..., 0].contiguous(), torch.rand(rows)
    slots = 1 - wide.exp()
    return {
        "no gate": gla.scan,
        "a gate a head": lambda *x: gla.scan(*x, narrow),
        "a gate a channel": lambda *x: gla.scan(*x, wide),
        "a strong gate a channel": lambda *x: gla.scan(*x, 16 * wide),
        "delta rule": lambda *x: delta.scan(*x, beta, l2norm=True),
        "gated delta rule": lambda *x: delta.scan(*x, beta, narrow, l2norm=True),
        "slots": lambda *x: gsa.scan(*x, slots, wide),
    }


def measured(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of processor time, the least of several runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return 1e3 * best


def compare(scan: Scan, heads: int) -> dict[str, Any]:
    given = [torch.randn(1, heads, TOKENS, WIDTH) for _ in range(3)]

    def reading() -> Tensor:
        with torch.no_grad():
            return scan(*given)[0]

    def training() -> None:
        scan(*(x.clone().requires_grad_() for x in given))[0].sum().backward()

    found: dict[str, Any] = {}
    for kind, function in (("reading", reading), ("training", training)):
        times = {}
        for name, repeats in (("naive", 1), ("torch", 5)):
            with backend(name):
                times[name] = measured(function, repeats)
        found[kind] = {"milliseconds": times, "naive_over_torch": times["naive"] / times["torch"]}
    return found


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for heads in HEADS:
        for name, scan in forms(heads).items():
            results[f"{name}, {heads} heads"] = found = compare(scan, heads)
            ratios = [f"{kind} {own['naive_over_torch']:.1f}x" for kind, own in found.items()]
            print(f"{name}, {heads} heads:", ", ".join(ratios), flush=True)
    save("linear_ops", results)


if __name__ == "__main__":
    main()
