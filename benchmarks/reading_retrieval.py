"""Reading 256k tokens with memorizing attention: what the state grows by, and how fast it goes.

    python benchmarks/reading_retrieval.py [tokens]

Twice: with a cache that never fills, and with a ring of 8,192 tokens. A random backbone of two
layers reads random ids in pieces (what is asked depends on neither), and the bytes of the state are
noted after each. Until the cache is full they must grow by exactly what the memory declares, and
not at all from then on.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from common import save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap

PIECE, RING = 8192, 8192


def backbone() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, head_dim=32,
        )
    )  # fmt: skip


def reading(cache_size: int, text: Tensor) -> dict[str, Any]:
    """What the state grows by while `text` `(1, T)` is read."""
    config = memwrap.MemorizingConfig(segment_size=512, cache_size=cache_size, top_k=32)
    model: Any = memwrap.wrap(backbone(), config).eval()
    declared = model.memories["memorizing"].bytes_per_token
    empty = model.new_state(1).nbytes
    state, steps, read = model.new_state(1), [], 0
    for piece in text.split(PIECE, 1):
        begin = time.perf_counter()
        state = model.read(piece, state=state)
        took = time.perf_counter() - begin
        read += piece.shape[1]
        steps.append({
            "tokens": read, "grown_bytes": state.nbytes - empty,
            "declared_bytes": declared * min(read, cache_size),
            "tokens_per_second": round(piece.shape[1] / took),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        })  # fmt: skip
        print(steps[-1], flush=True)
    met = all(s["grown_bytes"] == s["declared_bytes"] for s in steps)
    return {"cache_size": cache_size, "bytes_per_token": declared, "met": met, "steps": steps}


def main(tokens: int = 262_144) -> None:
    torch.set_num_threads(1)
    text = torch.randint(4, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    goal = "grown_bytes == declared_bytes at every length"
    runs = {"ring": reading(RING, text), "growing": reading(tokens, text)}
    save("reading_retrieval", {"goal": goal, "tokens": tokens, "segment_size": 512, **runs})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
