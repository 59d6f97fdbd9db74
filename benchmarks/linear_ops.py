"""Gated linear attention, the delta rule and gated slots on a CPU, against the specification.

python benchmarks/linear_ops.py

4,096 tokens of one row, head width 64, float32: on one thread, and on as many as torch takes by
itself. Both implementations run in turn; the least time of each counts, so that other work on the
machine hardly shows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from common import save, seconds
from torch import Tensor

from memwrap.ops import backend, delta, gla
from memwrap.ops.gla import gsa

TOKENS, WIDTH = 4_096, 64
HEADS = (1, 2, 8)
ALL_THREADS = torch.get_num_threads()
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


def compare(scan: Scan, heads: int) -> dict[str, Any]:
    given = [torch.randn(1, heads, TOKENS, WIDTH) for _ in range(3)]

    def reading() -> Tensor:
        with torch.no_grad():
            return scan(*given)[0]

    def training() -> None:
        scan(*(x.clone().requires_grad_() for x in given))[0].sum().backward()

    kinds, found = {"reading": reading, "training": training}, {}
    for kind, threads in product(kinds, sorted({1, ALL_THREADS})):
        torch.set_num_threads(threads)
        times = {"naive": float("inf"), "torch": float("inf")}
        rounds = 2 if kind == "reading" else 1  # the loop takes seconds to train
        turns = ["torch", "naive"] * rounds + ["torch"] * (6 - rounds)
        for name in turns:
            with backend(name):
                times[name] = min(times[name], 1e3 * seconds(kinds[kind]))
        ratio = times["naive"] / times["torch"]
        own = {"threads": threads, "milliseconds": times, "naive_over_torch": ratio}
        found[kind if threads == 1 else f"{kind}, all threads"] = own
    return found


def main() -> None:
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for heads in HEADS:
        for name, scan in forms(heads).items():
            results[f"{name}, {heads} heads"] = found = compare(scan, heads)
            ratios = [f"{kind} {own['naive_over_torch']:.1f}x" for kind, own in found.items()]
            print(f"{name}, {heads} heads:", ", ".join(ratios), flush=True)
    save("linear_ops", results)


if __name__ == "__main__":
    main()
