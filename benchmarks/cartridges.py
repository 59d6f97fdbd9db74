"""A document of some 2,600 tokens as 128 trained slots: what ten minutes of training give.

    python benchmarks/cartridges.py --model FOLDER [--topic assignment] [--minutes 10]

The document is a topic of Python's own manual. The model asks itself about it and answers with all
of it in context (`memwrap train cartridge`); 16 of these talks are held out. Slots that start from
attention matching are trained for `--minutes`, then, for as many steps, slots that start from the
keys and values of the document's first tokens. Numbers are nats per token of held-out answers: with
the full context, without the document, by compaction alone, and trained from both starts, paired
differences with their standard errors. Writes `results/cartridges.json`.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import torch
from common import save
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.training.cartridge import Cartridge, train_cartridge


def told(name: str, values: list[float], before: list[float]) -> str:
    """A row: the mean, and the difference to what compaction alone gives."""
    gaps = [a - b for a, b in zip(values, before, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return (
        f"| {name} | {statistics.mean(values):.3f} | {statistics.mean(gaps):+.3f} ± {error:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--topic", default="assignment")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = memwrap.wrap(base, "compact", memory_size=None)
    settings = Cartridge(slots=given.slots, minutes=given.minutes, seed=given.seed)
    found: dict[str, Any] = {}
    for start in ("match", "first"):
        trained = train_cartridge(
            model, tokenizer, topics[given.topic], replace(settings, start=start), print
        )
        found[start] = {**trained.summary(), "losses": trained.losses}
        settings = replace(settings, steps=trained.steps, minutes=60 * given.minutes)
        save("cartridges", {"topic": given.topic, "slots": given.slots, "seed": given.seed,
                            "minutes": given.minutes, "starts": found})  # fmt: skip
    rows = {"full context": "full", "no document": "no document", "compaction alone": "compaction",
            "trained from compaction": "trained"}  # fmt: skip
    before = found["match"]["held_out"]["compaction"]
    for name, key in rows.items():
        print(told(name, found["match"]["held_out"][key], before))
    print(told("first tokens", found["first"]["held_out"]["start"], before))
    print(told("trained from first tokens", found["first"]["held_out"]["trained"], before))


if __name__ == "__main__":
    main()
