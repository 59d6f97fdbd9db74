"""A trained memory far beyond the segments it was trained on, with and without its guards.

    python benchmarks/state_guards.py MODEL [--segments 240] [--documents 4] [--only READING]

Documents of the standard library are read with the memory as it was saved, with decays and caps,
and with the memory off. The table gives nats per token by segment, those with the memory off in the
first line, then each reading's difference to it (positive: worse) with the standard error over the
documents, and how much the layer whose sums grew most grew since the eighth segment.
`results/state_guards.json` keeps one entry a model and is written after each reading.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import save
from pages import load, put, table
from transformers import AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.perplexity import _memory
from memwrap.evaluation.run import documents

NAME = "state_guards"
EDGES = [0, 8, 32, 64, 120, 240]
SETTINGS: dict[str, dict[str, float]] = {
    "memory off": {},
    "as trained": {},
    "state_decay 0.8": {"state_decay": 0.8},
    "read_cap 0.05": {"read_cap": 0.05},
}


@torch.no_grad()
def reading(model: Any, ids: torch.Tensor, control: str | None) -> dict[str, Any]:
    """Nats per token by document and span, and norms by layer after every piece."""
    size, norms = model.segment_size, []
    nll = _memory(model, ids, torch.ones_like(ids), 8 * size, control, False, norms)
    spans = [nll[:, a * size : b * size].nanmean(1).tolist() for a, b in pairwise(EDGES)]
    return {"nats": [*spans, nll.nanmean(1).tolist()], "norms": norms if control is None else []}


def growth(norms: list[dict[str, Any]], name: str) -> float:
    """How many times as large as after the first piece the sums of a layer became, at most."""
    return max((norms[-1][name][k] / max(v, 1e-9) for k, v in norms[0][name].items()), default=1.0)


def rows_of(entry: dict[str, Any]) -> list[list[str]]:
    """The table of one model."""
    spans = [f"{a} to {b - 1}" for a, b in pairwise(EDGES)]
    off = torch.tensor(entry["readings"]["memory off"]["nats"])
    rows = [["segments", *spans, "all", "growth"]]
    rows.append(["memory off, nats", *[f"{v:.3f}" for v in off.mean(1).tolist()], ""])
    for name, values in entry["readings"].items():
        if name != "memory off":
            d = torch.tensor(values["nats"]) - off
            error = d.std(1) / math.sqrt(d.shape[1])
            cells = [f"{m:+.3f} ± {e:.3f}" for m, e in zip(d.mean(1), error, strict=True)]
            grown = growth(values["norms"], entry["memory"])
            rows.append([name, *cells, f"{grown:.1f}"])
    return rows


def page(results: dict[str, Any]) -> str:
    """What `docs/howto/finetune.md` says of all models."""
    parts = [
        "Nats per token by segment, on held-out documents of the standard library, four of "
        f"{EDGES[-1]} segments each (`python benchmarks/state_guards.py MODEL`); differences to "
        "the memory off by documents, with their standard error (positive: worse). Growth: of the "
        "layer whose sums grew most, from segment 8 to the end."
    ]
    for name, entry in results.items():
        parts += [f"**{entry.get('about', name)}**", table(rows_of(entry))]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--label", default=None, help="of the entry; default: the model's name")
    parser.add_argument("--about", default=None, help="what the page calls it")
    parser.add_argument("--segments", type=int, default=240)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--split", default="test")
    parser.add_argument("--only", nargs="*", default=[], help="add these readings to the entry")
    args = parser.parse_args()
    model = memwrap.load(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(asset(args.model) or args.model)
    tokens = args.segments * model.segment_size
    ids = torch.stack(documents("stdlib", args.split, tokenizer, tokens, args.documents))
    config = model.memory_configs[0]
    label = args.label or Path(args.model).name
    before_now = load(NAME).get(label, {}).get("readings", {}) if args.only else {}
    entry: dict[str, Any] = {
        "memory": config.name, "settings": config.to_dict(), "split": args.split,
        "documents": len(ids), "segments": args.segments, "readings": before_now,
        "about": args.about or label,
    }  # fmt: skip
    for name in args.only or SETTINGS:
        settings = SETTINGS[name]
        before = model.memory_settings(config.name, **settings)
        control = "off" if name == "memory off" else None
        entry["readings"][name] = reading(model, ids, control)
        model.memory_settings(config.name, **before)
        results = {k: v for k, v in load(NAME).items() if k not in ("benchmark", "machine")}
        results[label] = entry
        save(NAME, results)
        if "memory off" in entry["readings"]:
            print(table(rows_of(entry)), flush=True)
    put("howto/finetune.md", NAME, page(results))


if __name__ == "__main__":
    main()
