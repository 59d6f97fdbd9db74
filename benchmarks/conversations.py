"""Conversations over many sessions with SmolLM2 and memories that chat can use.

    python benchmarks/conversations.py [--turns 24 64] [--dialogues 2] [--memories window infllm ...]

Every memory hears the same conversations (`memwrap eval --task conversations` runs one memory with
all controls). Here a control is left out where another row is the same: the base with all of the
text is measured once, and window + sinks are the memory `window` itself. An `infllm` keeps all of the
text, so that equal bytes are the full context. `results/conversations.json` is written after each
memory.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import save
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.controls import FULL, MEMORY, OFF, TRUNCATED, WINDOW
from memwrap.evaluation.conversations import evaluate_conversations

NAME = "conversations"
SETTINGS: dict[str, dict[str, Any]] = {
    "window": {"segment_size": 128, "window_size": 512, "num_sinks": 4},
    "compact": {"segment_size": 128, "memory_size": 384, "slots": 128},
    "infllm": {"segment_size": 512, "window_size": 512, "block_size": 16, "top_k": 48},
    "armt-facts": {},
}
READERS = {
    "window": (MEMORY, OFF, TRUNCATED, FULL),
    "compact": (MEMORY, WINDOW),
    "infllm": (MEMORY,),
    "armt-facts": (MEMORY, OFF, WINDOW),
}


def opened(base: Any, name: str) -> Any:
    if name == "armt-facts":
        return memwrap.load(asset(name), base).eval()
    return memwrap.wrap(base, name, **SETTINGS[name]).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--dialogues", type=int, default=2)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memories", nargs="+", default=list(SETTINGS))
    given = parser.parse_args()
    folder: Any = asset(given.model) or given.model
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results: dict[str, Any] = {}
    for name in given.memories:
        model = opened(base, name)
        start = time.process_time()
        result = evaluate_conversations(
            model, tokenizer, given.turns, dialogues=given.dialogues, each=given.each,
            readers=READERS[name], seed=given.seed, name=f"{given.model} with {name}",
        )  # fmt: skip
        print(name, f"{time.process_time() - start:.0f} s", result.table(), sep="\n", flush=True)
        results[name] = result.to_dict()
        save(NAME, {"about": vars(given), "settings": SETTINGS, "results": results})
        memwrap.unwrap(model)


if __name__ == "__main__":
    main()
