"""Conversations over many sessions with SmolLM2 and memories that chat can use.

    python benchmarks/conversations.py [--turns 24 64] [--seeds 0] [--memories window infllm ...]

Every memory hears the same conversations (`memwrap eval --task conversations` runs one memory with
all controls). Here a control is left out where another row is the same: the base with all of the
text is measured once, and window + sinks are the memory `window` itself. An `infllm` keeps all of
the text, so that equal bytes are the full context. `results/conversations.json` is written after
each conversation, and a run goes on from it; `--table` writes the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from common import RESULTS, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.controls import FULL, MEMORY, OFF, TRUNCATED, WINDOW
from memwrap.evaluation.conversations import ConversationsResult, evaluate_conversations

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
EACH = 3


def opened(base: Any, name: str) -> Any:
    if name == "armt-facts":
        return memwrap.load(asset(name), base).eval()
    return memwrap.wrap(base, name, **SETTINGS[name]).eval()


def known() -> dict[str, Any]:
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def joined(results: dict[str, Any]) -> str:
    """Tables of all conversations, a reader for each memory and each of its controls."""
    whole = ConversationsResult("", 0, 0, EACH, 8)
    for key, values in results.items():
        memory = key.split(",")[0]
        for outcome in ConversationsResult.from_dict(values).outcomes:
            own = memory if outcome.curve == MEMORY else f"{memory}: {outcome.curve}"
            curve = outcome.curve if outcome.curve == FULL else own
            whole.outcomes.append(type(outcome)(**{**vars(outcome), "curve": curve}))
    return whole.table()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--memories", nargs="+", default=list(SETTINGS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(joined(known()))
        return
    folder: Any = asset(given.model) or given.model
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in given.memories:
        model = opened(base, name)
        for turns in given.turns:
            for seed in given.seeds:
                key = f"{name}, {turns} turns, seed {seed}"
                if key in known():
                    continue
                start = time.process_time()
                result = evaluate_conversations(
                    model, tokenizer, [turns], dialogues=1, topics=EACH, readers=READERS[name],
                    seed=seed, name=f"{given.model} with {name}", progress=False,
                )  # fmt: skip
                print(key, f"{time.process_time() - start:.0f} s of CPU", flush=True)
                save(NAME, {"settings": SETTINGS, "results": known() | {key: result.to_dict()}})
        memwrap.unwrap(model)


if __name__ == "__main__":
    main()
