"""Whole documents compacted to a part of their bytes: planted facts asked afterwards.

    python benchmarks/compact_whole.py --model FOLDER [--texts 3] [--tokens 700] [--seed 0]

A document is a topic of Python's own manual with six sentences planted in it, `The code of the
NAME is NUMBER.`; each is asked about afterwards, as the text goes on: `The code of the NAME is`.
Read once with full attention, then compacted to 10, 25 and 50 % of its tokens (a slot has 3 % more
bytes than a token); beside it keys that are only chosen, the last tokens with sinks, all, and none.
Numbers are nats per token of the codes, and how many of them come back exactly (greedy). Every
text's numbers are saved in `results/compact_whole.json` as soon as they are there, and a run goes
on from them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from common import RESULTS, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap

NAMES = ("lamp", "boat", "tower", "garden", "engine", "mirror")
PARTS = (0.1, 0.25, 0.5)
NAME = "compact_whole"


def document(tokenizer: Any, number: int, tokens: int, seed: int) -> tuple[list[int], list[str]]:
    """Ids of a text with facts in it, and the codes."""
    draw = random.Random(f"{seed} {number}")
    chosen = [t for t in sorted(topics) if len(topics[t]) > 6 * tokens]
    draw.shuffle(chosen)
    ids = tokenizer(topics[chosen[number]], add_special_tokens=False)["input_ids"][:tokens]
    codes = [str(draw.randrange(1000, 10000)) for _ in NAMES]
    pieces, size = [], tokens // len(NAMES)
    for n, (name, code) in enumerate(zip(NAMES, codes, strict=True)):
        fact = tokenizer(f"\nThe code of the {name} is {code}.\n", add_special_tokens=False)
        part = ids[n * size : (n + 1) * size]
        place = draw.randrange(len(part))
        pieces += [*part[:place], *fact["input_ids"], *part[place:]]
    return pieces, codes


@torch.no_grad()
def asked(model: Any, tokenizer: Any, state: Any, codes: list[str]) -> dict[str, float]:
    """Nats per token of the codes, and how many are written exactly."""
    nats, right = [], 0
    for name, code in zip(NAMES, codes, strict=True):
        ask = tokenizer(f"\nThe code of the {name} is", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ask + tokenizer(f" {code}", add_special_tokens=False)["input_ids"]])
        out = model(ids, cache=state.clone(), remember=False)
        logs = out.logits[0, len(ask) - 1 : -1].log_softmax(-1)
        wanted = ids[0, len(ask) :]
        nats.append(-float(logs.gather(-1, wanted[:, None]).mean()))
        right += bool((logs.argmax(-1) == wanted).all())
    return {"nats": statistics.mean(nats), "exact": right}


def measured(base: Any, tokenizer: Any, ids: list[int], codes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    text = torch.tensor([ids])
    for merge in ("match", "select"):
        model = memwrap.wrap(base, "compact", memory_size=None, slots=1, merge=merge)
        full = model.close_segment(model.read(text))
        if merge == "match":
            found["full"] = asked(model, tokenizer, full, codes)
            found["none"] = asked(model, tokenizer, model.new_state(1), codes)
        for part in PARTS:
            start = time.process_time()
            small = model.compact(full, max(1, int(part * len(ids)) - 4))
            seconds = time.process_time() - start
            entry = asked(model, tokenizer, small, codes)
            found[f"{merge} {part}"] = {**entry, "seconds": seconds, "bytes": small.nbytes}
        memwrap.unwrap(model)
    for part in PARTS:
        keep = int(part * len(ids)) - 4
        model = memwrap.wrap(base, "compact", memory_size=keep, slots=1, merge="select")
        state = model.close_segment(model.read(text))
        found[f"window {part}"] = asked(model, tokenizer, state, codes)
        memwrap.unwrap(model)
    return {"tokens": len(ids), "found": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    same = old.get("seed") == given.seed and old.get("asked_tokens") == given.tokens
    texts = old["texts"] if same else []
    for number in range(len(texts), given.texts):
        ids, codes = document(tokenizer, number, given.tokens, given.seed)
        texts.append(measured(base, tokenizer, ids, codes))
        save(NAME, {"seed": given.seed, "asked_tokens": given.tokens, "texts": texts})
    for reader in texts[0]["found"]:
        nats = statistics.mean(text["found"][reader]["nats"] for text in texts)
        exact = sum(text["found"][reader]["exact"] for text in texts)
        print(f"{reader:16s} {nats:.3f} {exact} of {len(texts) * len(NAMES)}")


if __name__ == "__main__":
    main()
