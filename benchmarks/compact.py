"""Compact memory without training: nats per token of what follows a text, at equal keys per head.

    python benchmarks/compact.py --model FOLDER [--texts 8] [--seed 0] [--keys 64 128 256]

Texts are topics of Python's own manual (`pydoc_data.topics`), in an order drawn by the seed: the
next `--next` tokens after the first `--tokens` of each. All variants are one memory, read in
segments of 128; K keys of a KV head are 4 sinks, slots and recent rows altogether. Full attention
and no context stand beside them, and every variant's paired difference to the window with its
standard error. `results/compact.json` keeps the single texts' numbers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from common import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap

SEGMENT, SINKS = 128, 4


def variants(keys: int) -> dict[str, dict[str, Any]]:
    """Settings by name: the window, and half of the keys as slots."""
    half = keys // 2
    slots = {"slots": half, "memory_size": keys - half - SINKS}
    return {
        "window": {"slots": 1, "memory_size": keys - SINKS - 1, "merge": "select"},
        "select": {**slots, "merge": "select"},
        "mean": {**slots, "merge": "mean"},
        "match": slots,
        "match, every query": {**slots, "reference_every": 1},
        "match, share weights": {**slots, "share_weights": True},
        "match, ridge 0.1": {**slots, "ridge": 0.1},
    }  # fmt: skip


def texts_of(tokenizer: Any, count: int, tokens: int, seed: int) -> list[Tensor]:
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    found = []
    for name in names:
        ids = tokenizer(topics[name], return_tensors="pt").input_ids
        if ids.shape[1] >= tokens and len(found) < count:
            found.append(ids[:, :tokens])
    return found


def nats(model: Any, text: Tensor, first: int, read: bool = True) -> float:
    """Mean loss of the tokens from `first` on, read as one open segment behind the others."""
    state = model.close_segment(model.read(text[:, : first - 1])) if read else model.new_state(1)
    rest = text[:, first - 1 :]
    with torch.no_grad():
        return float(model(rest, labels=rest, cache=state, remember=False).loss)


def measure(base: Any, texts: list[Tensor], first: int, read: bool = True, **settings: Any) -> dict:
    model = memwrap.wrap(base, "compact", segment_size=SEGMENT, num_sinks=SINKS, **settings)
    start = time.perf_counter()
    found = [nats(model, text, first, read) for text in texts]
    seconds = (time.perf_counter() - start) / len(texts)
    memwrap.unwrap(model)
    return {"nats": found, "seconds_a_text": round(seconds, 2), "settings": settings}


def summary(found: dict[str, dict], against: str) -> None:
    """Add means, and paired differences to one of them."""
    for entry in found.values():
        values, other = entry["nats"], found[against]["nats"]
        differences = [a - b for a, b in zip(values, other, strict=True)]
        spread = statistics.stdev(differences) if len(values) > 1 else 0.0
        entry["mean"] = round(statistics.mean(values), 4)
        entry["difference"] = round(statistics.mean(differences), 4)
        entry["standard_error"] = round(spread / len(values) ** 0.5, 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--next", type=int, default=192)
    parser.add_argument("--keys", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--name", default="compact")
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = texts_of(tokenizer, given.texts, given.tokens + given.next, given.seed)
    shared = {
        "full": measure(base, texts, given.tokens, memory_size=None),
        "no context": measure(base, texts, given.tokens, False),
    }
    results = {}
    for keys in given.keys:
        wanted = {n: s for n, s in variants(keys).items() if given.only is None or n in given.only}
        found = {n: measure(base, texts, given.tokens, **s) for n, s in wanted.items()}
        found |= {n: dict(entry) for n, entry in shared.items()}
        summary(found, "window" if "window" in found else "full")
        results[str(keys)] = found
        print(
            {n: (e["mean"], e["difference"], e["standard_error"]) for n, e in found.items()},
            flush=True,
        )
    save(given.name, {"seed": given.seed, "texts": len(texts), "tokens": given.tokens,
                      "next": given.next, "keys": results})  # fmt: skip


if __name__ == "__main__":
    main()
