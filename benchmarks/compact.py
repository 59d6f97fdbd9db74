"""Compact memory without training: nats per token of streamed texts, at equal keys per head.

    python benchmarks/compact.py --model FOLDER [--each 8] [--tokens 768] [--keys 64 128 256]

Texts are of three kinds that every machine with Python has, `--each` of every kind, in an order
drawn by the seed: topics of its manual, source of its library, and a module's docstrings. They
are read in segments, and the loss is that of the tokens after `--first`. All variants are one
memory; K keys of a KV head are 4 sinks, slots (half of K where nothing else is said) and recent
rows altogether. Segments have 3/4 K - 4 tokens, for the window too. Full attention and no context
beyond the segment stand beside them, and every variant's paired difference to the window with its
standard error. `results/compact.json` keeps every text's numbers, is written after each variant,
and a run goes on from it.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import sysconfig
import time
from functools import cache
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from common import RESULTS, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap

SINKS, ROWS = 4, 8
LEFT_OUT = {"site-packages", "test", "tests", "encodings", "pydoc_data", "idlelib"}


def variants(keys: int, shares: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """Settings by name; `shares` of `memwrap eval --task head-budgets`."""

    def split(slots: int) -> dict[str, Any]:
        return {"slots": slots, "memory_size": keys - slots - SINKS}

    half = split(keys // 2)
    found = {
        "window": {**split(1), "merge": "select"},
        "no context": {"slots": 1, "memory_size": 1, "merge": "select", "num_sinks": 0},
        "select": {**half, "merge": "select"},
        "match": half,
        "match, fewer slots": split(keys // 4),
        "match, more slots": split(3 * keys // 4),
        "match, values alone": {**half, "bias_bound": 0},
        "match, share weights": {**half, "share_weights": True},
        "match, no sinks": {**half, "num_sinks": 0, "slots": half["slots"] + SINKS},
        "match, every 4th query": {**half, "reference_every": 4},
        "mean": {**half, "merge": "mean"},
    }  # fmt: skip
    if shares is not None:
        found["match, budgets"] = {**half, "budgets": shares}
    segment = 3 * keys // 4 - SINKS
    return {name: {"segment_size": segment, **settings} for name, settings in found.items()}


@cache
def kinds_of_text() -> tuple[list[str], ...]:
    """Texts of the three kinds: topics of the manual, source files, their docstrings."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(library.rglob("*.py")) if not LEFT_OUT & set(p.parts)]
    code = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    docstrings = []
    for text in code:
        try:
            nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, _DOCUMENTED)]
        except SyntaxError:
            continue
        docstrings.append("\n\n".join(d for n in nodes if (d := ast.get_docstring(n))))
    return [topics[n] for n in sorted(topics)], code, docstrings


def texts_of(tokenizer: Any, each: int, tokens: int, seed: int) -> list[Tensor]:
    """Ids `(tokens,)` of texts, those of the three kinds in turn."""
    found = []
    for number, kind in enumerate(kinds_of_text()):
        long = [text[: 8 * tokens] for text in kind if len(text) > 3 * tokens]
        random.Random(f"{seed} {number}").shuffle(long)
        rows = (tokenizer(t, return_tensors="pt").input_ids[0, :tokens] for t in long)
        found.append(list(islice((row for row in rows if len(row) == tokens), each)))
    return [row for rows in zip(*found, strict=True) for row in rows]


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


@torch.no_grad()
def nats(model: Any, rows: Tensor, first: int) -> list[float]:
    """Mean loss of every row's tokens from `first` on."""
    hidden = model.base_model(rows).last_hidden_state
    head = model.get_output_embeddings()
    total = torch.zeros(len(rows))
    for at in range(first - 1, rows.shape[1] - 1, 64):
        part = slice(at, min(at + 64, rows.shape[1] - 1))
        logs = head(hidden[:, part]).float().log_softmax(-1)
        targets = rows[:, part.start + 1 : part.stop + 1, None]
        total -= logs.gather(-1, targets).sum((1, 2))
    return (total / (rows.shape[1] - first)).tolist()


def measure(base: Any, texts: list[Tensor], first: int, settings: dict[str, Any]) -> dict:
    model = memwrap.wrap(base, "compact", **{"num_sinks": SINKS, **settings})
    start, found = time.process_time(), []
    for at in range(0, len(texts), ROWS):
        found += nats(model, torch.stack(texts[at : at + ROWS]), first)
    seconds = (time.process_time() - start) / len(texts)
    memwrap.unwrap(model)
    told = {name: value for name, value in settings.items() if name != "budgets"}
    return {"nats": found, "cpu_seconds_a_text": round(seconds, 2), "settings": told}


def summary(found: dict[str, dict]) -> str:
    """Means, and paired differences to the window."""
    lines = []
    for name, entry in found.items():
        gaps = [a - b for a, b in zip(entry["nats"], found["window"]["nats"], strict=True)]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        kinds = " ".join(f"{statistics.mean(gaps[n::3]):+.3f}" for n in range(3))
        mean, gap = statistics.mean(entry["nats"]), statistics.mean(gaps)
        lines.append(f"{name:24s} {mean:.4f} {gap:+.4f} +- {error:.4f}  {kinds}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--first", type=int, default=384)
    parser.add_argument("--keys", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--budgets", type=Path, help="file of `memwrap eval --task head-budgets`")
    parser.add_argument("--name", default="compact")
    given = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts = texts_of(tokenizer, given.each, given.tokens, given.seed)
    about = {"seed": given.seed, "each": given.each, "tokens": given.tokens, "first": given.first}
    path = RESULTS / f"{given.name}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    results = old["keys"] if all(old.get(n) == v for n, v in about.items()) else {}
    for keys in given.keys:
        found = results.setdefault(str(keys), {})
        shares = json.loads(given.budgets.read_text())["shares"] if given.budgets else None
        wanted = variants(keys, shares) | {"full": {"memory_size": None, "segment_size": 256}}
        for name, settings in wanted.items():
            if name in found or (given.only is not None and name not in given.only):
                continue
            shared = next((r["full"] for r in results.values() if "full" in r), None)
            known = shared if name == "full" else None
            found[name] = known or measure(base, texts, given.first, settings)
            save(given.name, {**about, "keys": results})
            print(keys, name, flush=True)
        if "window" in found:
            print(f"{keys} keys\n{summary(found)}", flush=True)


if __name__ == "__main__":
    main()
