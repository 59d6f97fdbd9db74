"""Read 128,000 tokens of standard-library text with InfLLM and Landmark attention, with and
without offloading.

    python benchmarks/offloading.py [tokens]

Peak memory is what the state and the slots hold, by place (on the device and on the host), and the
process's resident set, sampled after every piece of 8 segments; each setting runs in a process of
its own. On a machine without a GPU the device is the CPU and both places are the same memory: the
bytes by place are what counts, and nothing moves over a bus. Times are the clock's and the
processor's: other work on the machine disturbs the first. Weights are those of the shipped LM; the
landmark's embedding is untrained, which changes no cost.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import psutil
import torch
from common import save
from reading import corpus_ids
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.assets import asset
from memwrap.state.trees import HOST, tree_leaves

SETTINGS: dict[str, dict[str, Any]] = {
    "infllm": {
        "segment_size": 128, "window_size": 512, "num_sinks": 16, "block_size": 32, "top_k": 8,
        "cache_size": 32,
    },
    "landmark": {
        "segment_size": 256, "block_size": 32, "top_k": 4, "cache_size": None,
    },
}  # fmt: skip
PIECE = 1024


def slots_of(memory: Any) -> list[Any]:
    """The device's slots for what lies on the host, where a memory has any."""
    return list(getattr(memory, "slots", {}).values())


def bytes_by_place(memory: Any, state: memwrap.MemoryState) -> dict[str, int]:
    """What the memory holds on the device and on the host."""
    places = {"device": sum(cache.nbytes for cache in slots_of(memory)), "host": 0}
    for tree in state.memories.values():
        for name, tensor in tree_leaves(tree):
            place = "host" if HOST in name.split(".") else "device"
            places[place] += tensor.numel() * tensor.element_size()
    return places


def run(name: str, offload: bool, tokens: int) -> dict[str, Any]:
    """One reading; what it held and how long it took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32).eval()
    model = memwrap.wrap(base.to(device), name, **SETTINGS[name], offload=offload)
    memory = model.memories[name]
    ids, process, state = corpus_ids(tokens).to(device), psutil.Process(), model.new_state(1)
    before, resident, held = process.memory_info().rss, [], []
    times: list[float] = []
    cpu: list[float] = []
    for first in range(0, tokens, PIECE):
        piece = ids[:, first : first + PIECE]
        start, busy = time.perf_counter(), time.process_time()
        state = model.read(piece, state=state)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / piece.shape[1])
        cpu.append((time.process_time() - busy) / piece.shape[1])
        resident.append(process.memory_info().rss)
        held.append(bytes_by_place(memory, state))
    tenth = max(1, len(times) // 10)
    result = {
        "memory": name,
        "offload": offload,
        "device_bytes_peak": max(h["device"] for h in held),
        "host_bytes_peak": max(h["host"] for h in held),
        "resident_growth_bytes": max(resident) - before,
        "ms_per_token": 1000 * sum(times) / len(times),
        "cpu_ms_per_token": 1000 * sum(cpu) / len(cpu),
        "cpu_ms_per_token_first_tenth": 1000 * sum(cpu[1 : tenth + 1]) / tenth,
        "cpu_ms_per_token_last_tenth": 1000 * sum(cpu[-tenth:]) / tenth,
        "slot_hits": sum(cache.hits for cache in slots_of(memory)),
        "slot_misses": sum(cache.misses for cache in slots_of(memory)),
    }
    if device == "cuda":
        result["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def main(tokens: int = 128_000) -> None:
    results = []
    for name in SETTINGS:
        for offload in ("0", "1"):
            command = [sys.executable, __file__, str(tokens), name, offload]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(out.splitlines()[-1]))
    save("offloading", {"tokens": tokens, "settings": SETTINGS, "readings": results})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        print(json.dumps(run(sys.argv[2], sys.argv[3] == "1", int(sys.argv[1]))))
    else:
        main(*map(int, sys.argv[1:]))
