"""Reading 256k tokens with memorizing attention: what the state grows by, and how fast it goes.

    python benchmarks/reading_retrieval.py [cache_size] [tokens]

A random backbone of two layers reads random ids in pieces (what is asked depends on neither), and
the bytes of the state are noted after each. Until the cache is full they must grow by exactly what
the memory declares, and not at all from then on.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from common import save
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap

PIECE = 8192


def main(cache_size: int = 8192, tokens: int = 262_144) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip
    model = memwrap.wrap(
        base, memwrap.MemorizingConfig(segment_size=512, cache_size=cache_size, top_k=32)
    ).eval()
    declared = model.memories["memorizing"].bytes_per_token
    empty = model.new_state(1)
    state, steps = empty, []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, tokens, PIECE):
        text = torch.randint(4, 4096, (1, PIECE), generator=generator)
        begin = time.perf_counter()
        state = model.read(text, state=state)
        took = time.perf_counter() - begin
        read = start + PIECE
        grown = state.nbytes - empty.nbytes
        steps.append(
            {
                "tokens": read,
                "grown_bytes": grown,
                "declared_bytes": declared * min(read, cache_size),
                "tokens_per_second": round(PIECE / took),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
            }
        )
        print(steps[-1], flush=True)
    wrong = [s["tokens"] for s in steps if s["grown_bytes"] != s["declared_bytes"]]
    values = {
        "goal": "grown_bytes == declared_bytes at every length",
        "met": not wrong,
        "bytes_per_token": declared,
        "cache_size": cache_size,
        "steps": steps,
    }
    save("reading_retrieval", values)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
