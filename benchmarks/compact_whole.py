"""Whole documents compacted to a part of their bytes: what follows them, codes and facts in them.

    python benchmarks/compact_whole.py --model FOLDER [--seed 0] [--budgets FILE]

24 documents of three kinds (those of `compact.py`: topics of Python's manual, source of its
library, docstrings), 18 of 700 tokens, 3 of 1,400 and 3 of 4,000. Each stands in the user's turn
of the model's chat template, as `memwrap chat --read` puts it there, with eight sentences planted
in equal shares of it: four codes (`The code of the NAME is NUMBER.`) and four of the invented
facts that the demo tells. Read once with full attention, then compacted to 10, 25 and 50 % of its
tokens (a slot has 3 % more bytes than a token); beside it keys that are only chosen, the last
tokens with sinks, all, and none. Then the text goes on for 192 tokens (nats per token), or the
turn ends in a question about each planted sentence; the answer is begun, and its last words are
judged (nats per token; right if greedy writes each of their tokens). Differences are paired, with
their standard errors over texts. Every text's numbers are in `results/compact_whole.json` as soon
as they are there, and a run goes on from them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from compact import texts_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.chat.turns import Turns
from memwrap.tasks.invented import FACTS

NAMES = ("lamp", "boat", "tower", "garden", "engine", "mirror", "bridge", "harbour")
LENGTHS = (700, 1400, 4000, 700, 700, 700, 700, 700)  # of the texts of each kind, in turn
PARTS = (0.1, 0.25, 0.5)
FOLLOWING = 192
NAME = "compact_whole"


@dataclass
class Document:
    """A text that was read, and what comes behind it.

    Attributes:
        ids: of the beginning of the turn and the text.
        following: ids of the text that follows.
        asked: by kind: ids of a question with the beginning of its answer, ids of the rest.
    """

    ids: list[int]
    following: list[int]
    asked: dict[str, list[tuple[list[int], list[int]]]]


def texts_without_repeats(tokenizer: Any, seed: int) -> list[torch.Tensor]:
    """Ids of texts, three kinds in turn, of every length; no two begin alike."""
    begun: set[tuple[int, ...]] = set()
    chosen: dict[int, list[torch.Tensor]] = {}
    for length in sorted(set(LENGTHS), reverse=True):  # few topics of the manual are long
        count = LENGTHS.count(length)
        rows = texts_of(tokenizer, count + len(begun) // 3, length + FOLLOWING, seed)
        new = [row for row in rows if tuple(row[:50].tolist()) not in begun]
        kinds = [[r for r in rows[kind::3] if any(r is n for n in new)] for kind in range(3)]
        chosen[length] = [r for many in zip(*(k[:count] for k in kinds), strict=True) for r in many]
        begun |= {tuple(row[:50].tolist()) for row in chosen[length]}
    rows = {length: iter(found) for length, found in chosen.items()}
    return [next(rows[length]) for length in LENGTHS for _ in range(3)]


def document(tokenizer: Any, text: torch.Tensor, number: int, seed: int) -> Document:
    """Plant sentences in a text, all but its last tokens, and ask for them."""
    draw = random.Random(f"{seed} {number}")
    told = [
        ("codes", f"What is the code of the {name}?", f"The code of the {name} is", f" {code}")
        for name in draw.sample(NAMES, 4)
        for code in [draw.randrange(1000, 10000)]
    ]
    for fact in draw.sample(FACTS, 4):
        begun = fact.sentence[: fact.sentence.index(fact.answer)].rstrip()
        told.append(("facts", fact.question, begun, f" {fact.answer}"))
    draw.shuffle(told)
    prose, share = text[:-FOLLOWING].tolist(), (len(text) - FOLLOWING) // len(told)
    turns, pieces = Turns(tokenizer), []
    for n, (_, _, begun, answer) in enumerate(told):
        place = n * share + draw.randrange(share)
        rest = prose[n * share : len(prose) if n + 1 == len(told) else (n + 1) * share]
        pieces += rest[: place - n * share]
        pieces += turns.encode(f"\n{begun}{answer}.\n") + rest[place - n * share :]
    lead, tail = turns.text([{"role": "user", "content": "<text>"}]).split("<text>")
    asked: dict[str, list[tuple[list[int], list[int]]]] = {"codes": [], "facts": []}
    for kind, question, begun, answer in told:
        put = turns.encode(f"\n\nAccording to the text above: {question}{tail}{begun}")
        asked[kind].append((put, turns.encode(answer)))
    return Document(turns.encode(lead) + pieces, text[-FOLLOWING:].tolist(), asked)


@torch.no_grad()
def asked(model: Any, state: Any, text: Document) -> dict[str, float]:
    """What a state knows of a document: nats per token of what follows and of the answers, and how
    many of them greedy writes."""
    behind = [("following", text.following[:1], text.following[1:])]
    behind += [(kind, *pair) for kind, pairs in text.asked.items() for pair in pairs]
    entry: dict[str, float] = {}
    for rows in (behind[:1], behind[1:]):
        lengths = [len(given) + len(wanted) for _, given, wanted in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        for row, (_, given, wanted) in zip(ids, rows, strict=True):
            row[: len(given) + len(wanted)] = torch.tensor(given + wanted)
        cache = state.repeat(len(rows))
        logits = model(ids, cache=cache, attention_mask=mask.long(), remember=False).logits
        for row, seen, (kind, given, wanted) in zip(ids, logits, rows, strict=True):
            logs = seen[len(given) - 1 : len(given) + len(wanted) - 1].log_softmax(-1)
            goal = row[len(given) : len(given) + len(wanted)]
            share = 1 / sum(kind == other for other, _, _ in rows)
            nats = -float(logs.gather(-1, goal[:, None]).mean())
            entry[kind] = entry.get(kind, 0.0) + share * nats
            right = bool((logs.argmax(-1) == goal).all())
            entry[f"{kind} right"] = entry.get(f"{kind} right", 0) + right
    return entry


def measured(base: Any, tokenizer: Any, text: Document, budgets: Any) -> dict[str, Any]:
    """All readers of one document."""
    found: dict[str, Any] = {}
    ids = torch.tensor([text.ids])
    keys = {part: max(8, int(part * len(text.ids)) - 4) for part in PARTS}
    for merge in ("match", "select"):
        model = memwrap.wrap(base, "compact", memory_size=None, slots=1, merge=merge)
        start = time.process_time()
        full = model.close_segment(model.read(ids))
        seconds = time.process_time() - start
        if merge == "match":
            found["full"] = {**asked(model, full, text), "seconds": seconds, "bytes": full.nbytes}
            found["none"] = asked(model, model.new_state(1), text)
        ways = {f"{merge} {part}": (slots, {}) for part, slots in keys.items()}
        if merge == "match":
            again = {"queries": "repeat", "text": ids, "tokenizer": tokenizer}
            ways["match 0.25, repeat"] = keys[0.25], again
        for name, (slots, how) in ways.items():
            found[name] = compacted(model, full, slots, how, text)
        memwrap.unwrap(model)
    others = {"match 0.25, no bias": {"bias_bound": 0}}
    if budgets is not None:
        others["match 0.25, budgets"] = {"budgets": budgets}
    for name, settings in others.items():
        model = memwrap.wrap(base, "compact", memory_size=None, slots=1, **settings)
        full = model.close_segment(model.read(ids))
        found[name] = compacted(model, full, keys[0.25], {}, text)
        memwrap.unwrap(model)
    for part, keep in keys.items():
        model = memwrap.wrap(base, "compact", memory_size=keep, slots=1, merge="select")
        found[f"window {part}"] = asked(model, model.close_segment(model.read(ids)), text)
        memwrap.unwrap(model)
    return {"tokens": len(text.ids), "found": found}


def compacted(model: Any, full: Any, slots: int, how: dict[str, Any], text: Document) -> dict:
    """What is left of a document in so many slots, the seconds that took, and its bytes."""
    start = time.process_time()
    small = model.compact(full, slots, **how)
    seconds = time.process_time() - start
    return {**asked(model, small, text), "seconds": seconds, "bytes": small.nbytes}


def summary(texts: list[dict[str, Any]]) -> str:
    """Means; of what follows also the paired difference to the window of as many keys."""
    lines = []
    for reader in texts[0]["found"]:
        rows = [text["found"][reader] for text in texts]
        part = next((f"window {p}" for p in PARTS if f" {p}" in reader), "none")
        gaps = [r["following"] - t["found"][part]["following"] for r, t in
                zip(rows, texts, strict=True)]  # fmt: skip
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        cells = [statistics.mean(row[kind] for row in rows) for kind in ("codes", "facts")]
        right = [sum(row[f"{kind} right"] for row in rows) for kind in ("codes", "facts")]
        follow = statistics.mean(row["following"] for row in rows)
        lines.append(
            f"| {reader} | {follow:.3f} | {statistics.mean(gaps):+.3f} ± {error:.3f} | "
            f"{cells[0]:.2f} | {right[0]} | {cells[1]:.2f} | {right[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=3 * len(LENGTHS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=Path, help="file of `memwrap eval --task head-budgets`")
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    budgets = json.loads(given.budgets.read_text())["shares"] if given.budgets else None
    rows = texts_without_repeats(tokenizer, given.seed)
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    texts = old["texts"] if old.get("seed") == given.seed else []
    for number in range(len(texts), given.texts):
        text = document(tokenizer, rows[number], number, given.seed)
        found = measured(base, tokenizer, text, budgets)
        texts.append(found)
        save(NAME, {"seed": given.seed, "texts": texts})
        print(number, found["tokens"], flush=True)
    print(summary(texts))


if __name__ == "__main__":
    main()
