"""What memories cost beside the bare model: reading a segment, decoding a token, operations.

    python benchmarks/speed.py [tiny-lm|smollm2] [memories with commas, default all] [results' name]

Everything runs in turn in one process on one thread, and CPU time is counted, so that a busy
machine disturbs all alike: a ratio is the median over the rounds. Buffers are full before the
clock starts. `read` is a segment without logits over the bare decoder on the same tokens; `first`
is a text's first segment; `decode` a token with logits over one with transformers' cache of 512
tokens; `operations` are those that torch dispatches for it.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, save
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

import memwrap
from memwrap.assets import asset
from memwrap.backbones.cache_names import CACHE


def configs(segment: int) -> dict[str, memwrap.MemoryConfig]:
    """The memories that are measured; windows of 508 tokens and 4 sinks."""
    window: dict[str, Any] = {"segment_size": segment, "window_size": 508, "num_sinks": 4}
    plain: dict[str, Any] = {"segment_size": segment}
    return {
        "window": memwrap.WindowConfig(**window),
        "ahn": memwrap.AHNConfig(**window),
        "liger": memwrap.LigerConfig(**plain),
        "lolcats": memwrap.LoLCATsConfig(**plain),
        "armt": memwrap.ARMTConfig(**plain, num_memory_tokens=8, d_mem=32),
        "compressive": memwrap.CompressiveConfig(
            **plain, memory_size=512, compressed_size=128, compression_rate=4
        ),
        "landmark": memwrap.LandmarkConfig(**plain, block_size=64, top_k=4, cache_size=64),
        "infllm": memwrap.InfLLMConfig(
            segment_size=segment, window_size=512, num_sinks=4, block_size=64, top_k=4
        ),
        "extended_mind": memwrap.ExtendedMindConfig(**plain, cache_size=1280),
    }


class Operations(TorchDispatchMode):
    """A count of the operations that torch dispatches inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[], Any]) -> int:
    """Count the operations of a call."""
    with Operations() as mode:
        function()
    return mode.count


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU times of functions that run in turn."""
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    pairs = zip(times[name], times[base], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


@torch.no_grad()
def measure(base: Any, segment: int, name: str, rounds: int) -> dict[str, Any]:
    """Measure a memory on one model."""
    vocab, made = base.config.vocab_size, torch.Generator().manual_seed(0)

    def ids(count: int) -> torch.Tensor:
        return torch.randint(4, vocab, (1, count), generator=made)

    piece, token, long = ids(segment), ids(1), ids(max(6 * segment, 2048))
    past = base(input_ids=ids(512), use_cache=True)[CACHE]
    legacy = [(layer.keys, layer.values) for layer in past.layers]

    def decode_base() -> None:
        base(input_ids=token, **{CACHE: DynamicCache(legacy)}, use_cache=True)

    def read_base() -> None:
        base.model(input_ids=piece, use_cache=False)

    model = memwrap.wrap(copy.deepcopy(base), configs(segment)[name]).eval()
    full = model.read(long)
    state = model.read(piece[:, :8], state=full)  # moves on as generation does

    def decode() -> None:
        model(input_ids=token, cache=state)

    reads = {
        "base": read_base,
        "read": lambda: model.read(piece, state=full),
        "first": lambda: model.read(piece),
    }
    reading = medians(reads, rounds)
    decoding = medians({"base": decode_base, "decode": decode}, 4 * rounds)
    return {
        "segment": segment,
        "base_operations": operations(decode_base),
        name: {
            "read": ratio(reading, "read", "base"),
            "first": ratio(reading, "first", "base"),
            "decode": ratio(decoding, "decode", "base"),
            "operations": operations(decode),
        },
    }


def main(model: str = "tiny-lm", memories: str = "", name: str = "") -> None:
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(asset(model), dtype=torch.float32).eval()
    small = model == "tiny-lm"
    name = name or f"speed_{model}"
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() and memories else {}
    chosen = [m for m in memories.split(",") if m] or list(configs(1))
    for memory in chosen:  # each is written down as soon as it is measured
        known |= measure(base, 128 if small else 512, memory, 15 if small else 3)
        save(name, {k: v for k, v in known.items() if k not in ("benchmark", "machine")})


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    main(*sys.argv[1:])
