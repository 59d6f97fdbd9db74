"""Read 1,000,000 tokens of standard-library text with ARMT: is space flat, is time?

    python benchmarks/reading.py [tokens]

Memory is the process's resident set, sampled after every piece of 16 segments. Time per token
is compared in pairs: a piece at the far end against the same piece read from a state of 32,000
tokens, in turn, because the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import sys
import time

import psutil
import torch
from common import interleaved, save, spread
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.data.stdlib_corpus import stdlib_corpus

PIECE = 16 * 512


def corpus_ids(tokens: int) -> torch.Tensor:
    """`(1, tokens)` ids of concatenated standard-library text."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    ids: list[int] = []
    for document in stdlib_corpus():
        ids += tokenizer(document.text).input_ids
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise SystemExit(f"The corpus holds {len(ids):,} tokens only.")


def main(tokens: int = 1_000_000) -> None:
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32).eval()
    config = memwrap.ARMTConfig(segment_size=512, num_memory_tokens=8, d_mem=32)
    model = memwrap.wrap(base, config)
    for memory in model.memories.values():
        for layer in memory.layers.values():
            torch.nn.init.normal_(layer.value.weight, std=0.02)  # a memory that is really used
    ids = corpus_ids(tokens)
    process, state, early = psutil.Process(), model.new_state(1), None
    resident, nbytes = [], []
    start = time.perf_counter()
    for first in tqdm(range(0, tokens, PIECE), desc="reading", unit="piece"):
        state = model.read(ids[:, first : first + PIECE], state=state)
        if early is None and first + PIECE >= 32_000:
            early = state.clone()
        resident.append(process.memory_info().rss)
        nbytes.append(state.nbytes)
    total = time.perf_counter() - start
    tenth = max(1, len(resident) // 10)
    piece = ids[:, :PIECE]
    times = interleaved(
        {
            "at_32k": lambda: model.read(piece, state=early),
            "at_end": lambda: model.read(piece, state=state),
        },
        12,
    )
    ratios = [b / a for a, b in zip(times["at_32k"], times["at_end"], strict=True)]
    save(
        "reading",
        {
            "goal": "memory last tenth within 2% of first tenth; time at end <= 1.05x that at 32k",
            "tokens": int(state.tokens_seen[0]),
            "tokens_per_second": tokens / total,
            "resident_mb_first_tenth": max(resident[:tenth]) / 2**20,
            "resident_mb_last_tenth": max(resident[-tenth:]) / 2**20,
            "memory_last_over_first": max(resident[-tenth:]) / max(resident[:tenth]),
            "state_bytes": statistics.median(nbytes),
            "time_end_over_32k": spread(ratios),
        },
    )


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
