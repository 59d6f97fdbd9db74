"""The compressive memory on a CPU: against the specification, against a published
implementation, and over length. All in one run.

python benchmarks/infini_ops.py

The peer is `infini-transformer-pytorch` from PyPI (its `FastweightMemory`, which knows no grouped
heads: keys and values are repeated for it, as its users must). It is no dependency of memwrap:

    pip install --target peer --no-deps infini-transformer-pytorch einops rotary-embedding-torch
    PYTHONPATH=peer python benchmarks/infini_ops.py
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, save, spread
from torch import Tensor

from memwrap.ops import backend, infini

SEGMENT = 512
SHAPES = {
    "8 query heads, 2 memories, head dim 64": (8, 2, 64),
    "16 query heads, 8 memories, head dim 128": (16, 8, 128),
    "8 query heads, 8 memories, head dim 64": (8, 8, 64),
}
LENGTHS = (4_096, 16_384, 65_536, 262_144)


def inputs(heads: int, own: int, tokens: int, width: int) -> tuple[Tensor, ...]:
    """q, k, v of one row, and an empty memory."""
    q, k, v = (torch.randn(1, h, tokens, width, requires_grad=True) for h in (heads, own, own))
    return q, k, v, torch.zeros(1, own, width, width), torch.zeros(1, own, width)


def peer_scan(delta: bool, heads: int) -> Callable[..., Tensor]:
    """The published memory over the same segments: read with the state before, then write."""
    from infini_transformer_pytorch.infini_transformer import (
        FastweightMemory,
        retrieve_from_kv_memories,
    )

    memory = FastweightMemory(heads, use_mem_delta_rule=delta)

    def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        past, out = None, []
        for own in zip(*(x.split(SEGMENT, dim=2) for x in (q, k, v)), strict=True):
            queries = F.elu(own[0]) + 1
            read = None if past is None else retrieve_from_kv_memories(queries, past)
            out.append(torch.zeros_like(own[2]) if read is None else read)
            past = memory.create_new_memories(own[1], own[2], past)
        return torch.cat(out, dim=2)

    return scan


def reading(function: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def training(function: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: function().sum().backward()


def against_peer(heads: int, own: int, width: int, update: str) -> dict[str, Any]:
    """Ratios of the peer's time to ours in interleaved pairs, 4,096 tokens, float32."""
    q, k, v, M, z = inputs(heads, own, 4_096, width)
    peer = peer_scan(update == "delta", heads)

    def theirs() -> Tensor:
        return peer(q, k, v)

    def ours() -> Tensor:
        return infini.scan(q, k, v, M, z, SEGMENT, update=update)[0]

    with torch.no_grad():
        error = float((ours() - theirs()).abs().max())
    result: dict[str, Any] = {"largest_difference": error}
    for name, kind in (("reading", reading), ("training", training)):
        times = interleaved({"peer": kind(theirs), "memwrap": kind(ours)}, 9)
        ratios = [a / b for a, b in zip(times["peer"], times["memwrap"], strict=True)]
        milliseconds = {n: 1e3 * statistics.median(t) for n, t in times.items()}
        result[name] = {"milliseconds": milliseconds, "peer_over_memwrap": spread(ratios)}
    result["products_alone"] = products_alone(heads, own, width, update)
    return result


def products_alone(heads: int, own: int, width: int, update: str) -> float:
    """Milliseconds of the matrix products that reading 4,096 tokens needs, the least of several:
    every segment is read and written, for the delta rule read by its keys too; the first, with an
    empty memory, is written only."""
    q, k = torch.randn(own, heads // own * SEGMENT, width), torch.randn(own, SEGMENT, width)
    M, segments = torch.randn(own, width, width), 4_096 // SEGMENT
    out, kept, written = torch.empty_like(q), torch.empty_like(k), torch.empty_like(M)

    def least(function: Callable[[], object]) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    read = least(lambda: torch.bmm(q, M, out=out))
    read += least(lambda: torch.bmm(k, M, out=kept)) if update == "delta" else 0.0
    return (segments - 1) * read + segments * least(lambda: torch.bmm(k.mT, k, out=written))


def against_naive(update: str) -> dict[str, float]:
    """Seconds of both implementations, the least of three, 4,096 tokens, one head."""
    own = inputs(1, 1, 4_096, 64)
    found: dict[str, float] = {}
    for name in ("naive", "torch"):
        with backend(name), torch.no_grad():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                infini.scan(*own, SEGMENT, update=update)
                times.append(time.perf_counter() - start)
            found[name] = min(times)
    return found | {"naive_over_torch": found["naive"] / found["torch"]}


def kibibytes(field: str) -> int:
    """Of this process's memory: resident now (VmRSS), or at most so far (VmHWM)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE).group(1))  # type: ignore[union-attr]


def one_length(tokens: int, update: str, train: bool) -> dict[str, float]:
    """Processor time and peak memory a token, inputs and outputs included; in a fresh process."""
    q, k, v, M, z = inputs(4, 1, 1_024, 64)
    kind = training if train else reading
    kind(lambda: infini.scan(q, k, v, M, z, SEGMENT, update=update)[0])()
    before = kibibytes("VmRSS")
    q, k, v, M, z = inputs(4, 1, tokens, 64)
    run = kind(lambda: infini.scan(q, k, v, M, z, SEGMENT, update=update)[0])
    times = []
    for _ in range(5):
        q.grad = k.grad = v.grad = None
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    peak = kibibytes("VmHWM") - before
    return {
        "microseconds_per_token": 1e6 * min(times) / tokens,
        "bytes_per_token": 1024 * peak / tokens,
    }


def over_length(update: str, train: bool) -> dict[str, Any]:
    """By length of one call. The process keeps what it frees: glibc gives blocks of more than
    32 MB back after every call, and their pages, zeroed anew, would cost 0.4 µs a token."""
    found = {}
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    for tokens in LENGTHS:
        arguments = [sys.executable, __file__, str(tokens), update, str(int(train))]
        out = subprocess.run(
            arguments, check=True, capture_output=True, text=True, env=os.environ | kept
        ).stdout
        found[str(tokens)] = json.loads(out)
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        tokens, update, train = sys.argv[1:]
        print(json.dumps(one_length(int(tokens), update, train == "1")))
        return
    try:
        import infini_transformer_pytorch  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"infini-transformer-pytorch is missing ({error}); this benchmark compares with it.\n"
            f"How to install it beside memwrap is said at the top of {__file__}."
        ) from None
    result: dict[str, Any] = {"segment_size": SEGMENT}
    for update in infini.UPDATES:
        result[update] = {
            "naive": against_naive(update),
            "peer": {name: against_peer(*shape, update) for name, shape in SHAPES.items()},
            "reading_by_length": over_length(update, False),
            "training_by_length": over_length(update, True),
        }
    save("infini_ops", result)


if __name__ == "__main__":
    main()
