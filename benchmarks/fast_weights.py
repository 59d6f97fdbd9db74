"""Recall of key-value pairs over segments of 64 tokens by `lact`, beside a window of equal bytes.

    python benchmarks/fast_weights.py [--minutes 1.5] [--only untrained|lact|window] [--seed 0]
    python benchmarks/fast_weights.py --table  # puts what was recorded into the page

The backbone is a small new one (3 layers, 64 wide), trained along, as long for each: with fast
weights in two layers, and with a window that is longer by what their state takes. A segment holds
16 pairs `key mark value mark` (256 keys, none twice, and 16 values); behind the last segment come
16 questions for pairs of any. First comes what networks without any training give back: one step
on random pairs, which are then read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from pages import load, put, table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.ops import fast_weights
from memwrap.ops.fast_weights import FastMemory, StepRule, WriteGates

RESULTS = Path(__file__).parent / "results" / "fast_weights.json"
SEGMENT, PAIRS = 64, 16
LAYERS = [1, 2]
TRAINED = 3  # most segments of pairs
READ = (2, 4, 8)
ROWS = 32
VALUES, KEYS, SEP, GEN, EOS = 0, 16, 272, 273, 274  # ids
WAYS = {"lact": ("memory", "its window alone", "memory off"), "window": ("memory", "memory off")}


def sample(rows: int, segments: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and labels `(rows, 64 (segments + 1))`, and how many segments before the questions the
    pair of each stands, `(rows, 16)`."""
    count = PAIRS * segments
    keys = torch.rand(rows, 256, generator=generator).argsort(1)[:, :count] + KEYS
    values = torch.randint(16, (rows, count), generator=generator) + VALUES
    asked = torch.randint(count, (rows, PAIRS), generator=generator)

    def cells(keys: Tensor, mark: int, values: Tensor) -> Tensor:
        marks, ends = torch.full_like(keys, mark), torch.full_like(keys, EOS)
        return torch.stack([keys, marks, values, ends], -1).flatten(1)

    questions = cells(keys.gather(1, asked), GEN, values.gather(1, asked))
    ids = torch.cat([cells(keys, SEP, values), questions], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -SEGMENT + 2 :: 4] = ids[:, -SEGMENT + 2 :: 4]
    return ids, labels, segments - asked // PAIRS


def backbone() -> Any:
    config = LlamaConfig(
        vocab_size=276, hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=32,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.08,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=275,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def settings_of() -> dict[str, dict[str, Any]]:
    """Both memories, of the same bytes a row."""
    shared = {"segment_size": SEGMENT, "num_sinks": 0}
    model = memwrap.wrap(backbone(), "lact", layers=LAYERS, **shared)
    config = model.backbone.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    state = model.new_state(1).memories["lact"]["layers"]
    more = sum(x.numel() * 4 for tree in state.values() for n, x in tree.items() if n != "window")
    window = SEGMENT + math.ceil(more / token)
    return {
        "lact": {"layers": LAYERS, **shared},
        "window": {"window_size": window, **shared},
    }


def train(
    name: str, settings: dict[str, Any], minutes: float, seed: int
) -> tuple[Any, list[float]]:
    """Train for so many minutes of processor time; gives the loss of every step too."""
    torch.manual_seed(seed)
    model = memwrap.wrap(backbone(), name, **settings).train()
    memory = list(model.memory_parameters())
    known = {id(p) for p in memory}
    others = [p for p in model.parameters() if id(p) not in known]
    for parameter in others:
        parameter.requires_grad_(True)
    groups = [{"params": others, "lr": 3e-3}, {"params": memory, "lr": 3e-3}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98))
    rates = [g["lr"] for g in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    start, losses = time.process_time(), []
    while (spent := (time.process_time() - start) / 60) < minutes:
        # The first third reads one segment, so that short ways are learned first.
        most = 1 if spent < minutes / 3 else TRAINED
        segments = 1 + int(torch.randint(most, (1,), generator=generator))
        ids, labels, _ = sample(ROWS, segments, generator)
        factor = min(1.0, (len(losses) + 1) / 50) * (1.05 - spent / minutes)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            print(f"{name} step {len(losses)}: {sum(losses[-20:]) / 20:.3f}", flush=True)
    return model.eval(), losses


@torch.no_grad()
def recalled(model: Any, segments: int, way: str, rows: int) -> list[float]:
    """Share of right answers by the segment that the pair stands in, the nearest first."""
    generator = torch.Generator().manual_seed(1000 + segments)
    ids, labels, near = sample(rows, segments, generator)
    control = "off" if way == "memory off" else None
    branch = "window" if way == "its window alone" else "both"
    (memory,) = model.memories.values()
    with memory.only(branch):
        parts = [
            model(part, memory_control=control, logits_to_keep=SEGMENT).logits.argmax(-1)
            for part in ids.split(16)
        ]
    right = torch.cat(parts)[:, 1::4] == labels[:, -SEGMENT + 2 :: 4]
    return [round(float(right[near == n].float().mean()), 3) for n in range(1, segments + 1)]


def untrained(width: int = 64, draws: int = 8) -> dict[str, list[float]]:
    """Share of 16, 64 and 256 pairs whose own value is nearest to what is read, after one step."""
    shares: dict[str, list[float]] = {}
    for step, rate in (("gradient", 0.01), ("gradient", 0.1), ("gradient", 1.0), ("muon", 0.01)):
        rule = StepRule(step=step)  # type: ignore[arg-type]
        for pairs in (16, 64, 256):
            torch.manual_seed(0)
            first = tuple(torch.randn(1, draws, width, width) * width**-0.5 for _ in range(3))
            keys = torch.nn.functional.silu(torch.randn(1, draws, pairs, width))
            keys = keys / keys.norm(dim=-1, keepdim=True)
            values = torch.nn.functional.silu(torch.randn(1, draws, pairs, width))
            gates = WriteGates(torch.full((1, draws, pairs, 1), rate))
            memory = fast_weights.write(rule, FastMemory(first), keys, values, gates, first)
            read = fast_weights.read("swiglu", memory.weights, keys)
            nearest = (
                torch.nn.functional.normalize(read, dim=-1)
                @ torch.nn.functional.normalize(values, dim=-1).mT
            )
            right = nearest.argmax(-1) == torch.arange(pairs)
            shares.setdefault(f"{step}, rate {rate}", []).append(float(right.float().mean()))
    return shares


def page() -> None:
    """Write the tables into the method's page."""
    done = load("fast_weights")
    rows = [["step", "16 pairs", "64 pairs", "256 pairs"]]
    rows += [[name, *(f"{x:.2f}" for x in shares)] for name, shares in done["untrained"].items()]
    text = (
        "**Without training.** One step on random unit keys and values, 64 wide, then the same "
        "keys are read: share of pairs whose own value is nearest (8 networks, seed 0).\n\n"
        + table(rows)
    )
    if "lact" in done:
        lact, window = done["lact"], done.get("window")
        text += (
            f"\n\n**Trained.** Share of right answers (of {lact['rows']} texts with 16 questions "
            f"each, chance 0.06) by the segment that the pair stands in, the nearest first. A new "
            f"backbone of 3 layers, 64 wide, was trained along, {lact['minutes']:g} minutes of one "
            f"thread each, seed {lact['seed']}: with networks in layers 1 and 2 ({lact['steps']} "
            f"steps, last loss {lact['loss']}; chance is 2.77)"
        )
        if window:
            text += (
                f", and with a window of {window['settings']['window_size']} tokens, which takes "
                f"the same bytes ({window['steps']} steps, last loss {window['loss']})"
            )
        text += f". Texts of at most {TRAINED} segments of pairs were trained on.\n"
        names = {"memory": "fast weights", "its window alone": "their window alone",
                 "memory off": "fast weights, memory off"}  # fmt: skip
        for n in READ:
            rows = [[f"{n} segments of pairs", *map(str, range(1, n + 1))]]
            for way, curve in lact["recall"].items():
                rows.append([names[way], *(f"{x:.2f}" for x in curve[str(n)])])
            if window:
                curve = window["recall"]["memory"][str(n)]
                rows.append(["window of equal bytes", *(f"{x:.2f}" for x in curve)])
            text += "\n" + table(rows) + "\n"
    text += "\nMade by `python benchmarks/fast_weights.py`."
    put("methods/lact.md", "fast_weights", text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--only", choices=["untrained", *WAYS])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    if options.table:
        page()
        return
    torch.set_num_threads(1)
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.only in (None, "untrained"):
        done["untrained"] = untrained()
        RESULTS.write_text(json.dumps(done, indent=1) + "\n")
    for name, settings in settings_of().items():
        if options.only not in (None, name):
            continue
        model, losses = train(name, settings, options.minutes, options.seed)
        curves = {
            way: {str(n): recalled(model, n, way, options.rows) for n in READ} for way in WAYS[name]
        }
        done[name] = {
            "settings": settings, "minutes": options.minutes, "seed": options.seed,
            "rows": options.rows, "steps": len(losses),
            "loss": round(sum(losses[-20:]) / len(losses[-20:]), 3), "recall": curves,
        }  # fmt: skip
        RESULTS.write_text(json.dumps(done, indent=1) + "\n")
        print(name, json.dumps(done[name]), flush=True)


if __name__ == "__main__":
    main()
