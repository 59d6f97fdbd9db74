"""Overhead of the engine: one segment through the wrapped tiny LM against the bare one.

    python benchmarks/overhead.py

The wrapped model runs the method's memory tokens and projections besides; these are timed
alone and added to the bare model's side: wrapped / (bare on segment + memory tokens + the
method's own operations). What is left is what the engine costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from common import interleaved, save, spread
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.assets import asset


def own_operations(model: memwrap.MemoryModelForCausalLM, state, length: int) -> Callable[[], None]:
    """Reads and writes of every layer on tensors of the right shapes, without the backbone."""
    memory = model.memories["armt"]
    tree = state.memories["armt"]
    hidden = torch.randn(1, length, model.config.hidden_size)

    def run() -> None:
        for layer in range(model.config.num_hidden_layers):
            memory.before_layer(layer, hidden, tree)
            memory.write_layer(layer, hidden[:, -memory.num_suffix :], tree)

    return run


@torch.no_grad()
def main(repeats: int = 40) -> None:
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32).eval()
    results = {}
    for size in (128, 512):
        config = memwrap.ARMTConfig(segment_size=size, num_memory_tokens=8, d_mem=32)
        model = memwrap.wrap(copy.deepcopy(base), config)
        ids = torch.randint(4, 4096, (1, size))
        longer = torch.randint(4, 4096, (1, size + 8))
        state = model.read(torch.randint(4, 4096, (1, size)))
        times = interleaved(
            {
                "bare": lambda ids=ids: base(input_ids=ids, use_cache=False),
                "bare_with_memory_tokens": lambda ids=longer: base(input_ids=ids, use_cache=False),
                "own_operations": own_operations(model, state, size + 8),
                "wrapped": lambda m=model, s=state, ids=ids: m(input_ids=ids, cache=s.clone()),
            },
            repeats,
        )
        columns = (times["bare_with_memory_tokens"], times["own_operations"], times["wrapped"])
        engine = [w / (b + o) for b, o, w in zip(*columns, strict=True)]
        whole = [w / b for b, w in zip(times["bare"], times["wrapped"], strict=True)]
        results[f"segment_{size}"] = {
            "milliseconds": {k: spread([1000 * t for t in v]) for k, v in times.items()},
            "wrapped_over_bare": spread(whole),
            "wrapped_over_bare_plus_method": spread(engine),
        }
    save("overhead", {"goal": "wrapped_over_bare_plus_method <= 1.05", **results})


if __name__ == "__main__":
    main()
