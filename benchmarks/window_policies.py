"""Window policies without training: codes found again at distances of 1k to 4k tokens.

    python benchmarks/window_policies.py --model smollm2 [--texts 5] [--window 256] [--minutes 10]

A text of Python's reference topics holds codes of four digits, some near each distance from its
end, and every one is asked for. An answer counts if all its digits are the likeliest, given those
before it (what greedy decoding gives). Policies differ in what the layers keep (`window`, every
second layer, full attention) and in which tokens see everything: none, those of the answer (which
repeats the question before the digits), or those of the question too. Policies with the same
layers share one reading of the text: what is marked changes nothing in front of it.
`results/window_policies.json` keeps every answer, is written after each text, and a run goes on
from it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch
from common import RESULTS, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.tasks.niah import prose

COLOURS = ("red", "blue", "green", "black", "white", "silver")
THINGS = ("gate", "tower", "garden", "bridge", "chest", "cellar")
NAME = "window_policies"
LAYERS = {
    "window": {"decode": "full"},
    "alternate": {"layers": "alternate", "decode": "full"},
    "full": {"decode": "full"},  # all of the text is marked
}
MARKS = ("none", "answer", "question")


def text_of(
    tokenizer: Any, seed: int, distances: list[int], each: int
) -> tuple[list[int], list[tuple[int, str, str]]]:
    """Ids of a text, and `(distance, what, code)` of what it hides."""
    draw = random.Random(seed)
    names = draw.sample([f"{c} {t}" for c in COLOURS for t in THINGS], len(distances) * each)
    codes = [f"{draw.randrange(10000):04d}" for _ in names]
    facts = [(d, n, c) for (d, n, c) in zip(sorted(distances * each), names, codes, strict=True)]
    sentences = prose()
    number, parts = draw.randrange(len(sentences)), []  # from the end
    waiting, length = list(facts), 0
    while waiting or length < max(distances):
        if waiting and length >= waiting[0][0]:
            _, name, code = waiting.pop(0)
            piece = f" The code of the {name} is {code}."
        else:
            piece = f" {sentences[number % len(sentences)]}"
            number -= 1
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        length += len(ids)
        parts.append(ids)
    opening = tokenizer("Remember the codes in this text.")["input_ids"]
    return opening + [i for part in reversed(parts) for i in part], facts


def question_of(tokenizer: Any, name: str, code: str) -> tuple[list[int], int, int]:
    """Ids of question and answer, where the answer begins, and how many ids the code has."""
    question = f"\n\nQuestion: What is the code of the {name}?\nAnswer:"
    ids = [
        tokenizer(p, add_special_tokens=False)["input_ids"]
        for p in (question, f" The code of the {name} is", f" {code}")
    ]
    return [i for part in ids for i in part], len(ids[0]), len(ids[2])


@torch.no_grad()
def right(model: Any, state: Any, asked: tuple[list[int], int, int], mark: str) -> bool:
    """Whether the code is what greedy decoding gives."""
    ids, answer, digits = asked
    first = {"none": None, "answer": state.tokens_seen + answer, "question": state.tokens_seen}
    given: dict[str, Tensor | None] = {"answer_from": first[mark]}
    row = torch.tensor([ids])
    logits = model(row[:, :-1], cache=state.clone(), logits_to_keep=digits, **given).logits
    return torch.equal(logits.argmax(-1), row[:, -digits:])


def measure(base: Any, tokenizer: Any, given: Any, seed: int) -> dict[str, list]:
    ids, facts = text_of(tokenizer, seed, given.distances, given.each)
    asked = [question_of(tokenizer, name, code) for _, name, code in facts]
    found: dict[str, list] = {"tokens": [len(ids)], "distance": [d for d, *_ in facts]}
    for name, settings in LAYERS.items():
        own = {"segment_size": 512, "window_size": given.window, "num_sinks": given.sinks}
        model = memwrap.wrap(base, "window", **{**own, **settings}).eval()
        start = time.process_time()
        state = model.new_state(1)
        with torch.no_grad():
            marked = {"answer_from": [0]} if name == "full" else {}
            model(torch.tensor([ids]), cache=state, logits_to_keep=1, **marked)
        seconds = time.process_time() - start
        for mark in MARKS if name != "full" else MARKS[:1]:
            answers = [right(model, state, one, mark) for one in asked]
            found[f"{name}, {mark}"] = answers
            print(seed, name, mark, sum(answers), f"{seconds:.0f} s", flush=True)
        memwrap.unwrap(model)
    return found


def summary(texts: list[dict[str, list]], distances: list[int]) -> str:
    """Share of right answers by distance, with the binomial error of the whole."""
    lines = [" ".join(["policy", *map(str, distances), "all", "error", "n"])]
    for name in texts[0]:
        if name in ("tokens", "distance"):
            continue
        pairs = [(d, a) for t in texts for d, a in zip(t["distance"], t[name], strict=True)]
        shares = [
            sum(a for d, a in pairs if d == want) / sum(d == want for d, _ in pairs)
            for want in distances
        ]
        n, share = len(pairs), sum(a for _, a in pairs) / len(pairs)
        error = (share * (1 - share) / n) ** 0.5
        lines.append(" ".join([f"{name:22s}", *(f"{s:.2f}" for s in shares),
                               f"{share:.3f} +- {error:.3f} n={n}"]))  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--distances", type=int, nargs="+", default=[1024, 2048, 3072, 4096])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    folder: Any = asset(given.model) or given.model
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    about = {n: v for n, v in vars(given).items() if n not in ("texts", "minutes")}
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    texts = old["texts"] if old.get("about") == about else []
    start = time.monotonic()
    while len(texts) < given.texts and time.monotonic() - start < 60 * given.minutes:
        texts.append(measure(base, tokenizer, given, given.seed + len(texts)))
        save(NAME, {"about": about, "texts": texts, "table": summary(texts, given.distances)})
    print(summary(texts, given.distances), flush=True)


if __name__ == "__main__":
    main()
