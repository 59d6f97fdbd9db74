"""DMS on the shipped tiny LM beside windows with sinks at equal keys: nats per token.

    python benchmarks/delayed_eviction.py [--steps 160] [--minutes 10]

Only the decision maps are trained, 4 texts of 448 tokens a step, by the backbone's own distribution
with full attention; the ratio grows from 1 to `--compression` in a straight line. Measured are the
tokens from 128 to 447 of held-out texts: the loss, and how many keys a query's heads see on
average, after every `--every` steps. Windows with 4 sinks are as large as that number, each
beside its DMS with the paired difference over texts; `full` is the base. The file in `results/` is
written after every measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.data.documents import load_documents, long_documents
from memwrap.engine.inputs import Teacher
from memwrap.memories.parts.training_progress import training_at
from memwrap.ops import delayed_eviction as ops
from memwrap.training.collating import DocumentDataset

TOKENS, FIRST, SINKS, ROWS = 448, 128, 4, 8


def texts_of(tokenizer: Any, split: str, count: int | None) -> Tensor:
    """Ids `(N, TOKENS)`, spread over the split's documents."""
    documents = long_documents(load_documents("stdlib", split), tokenizer, TOKENS)
    data = DocumentDataset(documents, tokenizer, TOKENS, TOKENS)
    chosen = range(len(data)) if count is None else [n * len(data) // count for n in range(count)]
    return torch.stack([torch.as_tensor(data[n]["input_ids"]) for n in chosen])


@torch.no_grad()
def nats(model: Any, texts: Tensor) -> list[float]:
    """Mean loss of every text's tokens from `FIRST` on."""
    found: list[float] = []
    for rows in texts.split(ROWS):
        logs = model(rows).logits[:, FIRST - 1 : -1].float().log_softmax(-1)
        found += (-logs.gather(-1, rows[:, FIRST:, None])).mean((1, 2)).tolist()
    return found


@torch.no_grad()
def keys_seen(model: Any, texts: Tensor) -> float:
    """Keys that a query from `FIRST` on sees, on average over layers and heads."""
    memory, made = model.memories["dms"], []
    for one in memory.maps.values():
        one.register_forward_hook(lambda module, args, out: made.append(out))
    counts = []
    for rows in texts.split(ROWS):
        made.clear()
        model(rows)
        for raw in made:
            gone = (ops.decision_logits(raw, 1.0) > 0).long()
            until = ops.visible_until(gone, memory.config.window_size)
            now = torch.arange(FIRST, TOKENS)[:, None]
            key = torch.arange(TOKENS)
            seen = (key <= now) & (now < until[:, :, None])
            counts.append(seen.sum(-1).float().mean().item())
    for one in memory.maps.values():
        one._forward_hooks.clear()
    return statistics.mean(counts)


def windowed(base: Any, texts: Tensor, keys: float) -> tuple[int, list[float]]:
    """Losses with a window and sinks of so many keys."""
    size = max(1, round(keys) - SINKS)
    model = memwrap.wrap(base, "window", segment_size=TOKENS, window_size=size, num_sinks=SINKS)
    found = nats(model.eval(), texts)
    memwrap.unwrap(model)
    return size + SINKS, found


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of the differences, and its standard error."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--compression", type=float, default=6.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--decisions", default="kv_head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32).eval()
    base.requires_grad_(False)
    held, train = (
        texts_of(tokenizer, s, n) for s, n in (("validation", given.texts), ("train", None))
    )
    order = torch.randperm(len(train))
    full = nats(base, held)
    results: dict[str, Any] = {"settings": vars(given), "full": full, "measured": []}
    model = memwrap.wrap(
        base, "dms", segment_size=TOKENS, window_size=given.window, decisions=given.decisions,
        compression=given.compression,
    )  # fmt: skip
    maps = list(model.memory_parameters())
    optimizer = torch.optim.AdamW(maps, lr=given.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.monotonic()
    for step in range(1, given.steps + 1):
        rows = train[order[[(4 * step + n) % len(order) for n in range(4)]]]
        with torch.no_grad():
            taught = Teacher(base.model(rows).last_hidden_state, labels=0.0)
        with training_at((step - 1) / given.steps):
            loss = model.train()(rows, labels=rows, teacher=taught).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(maps, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % given.every and step != given.steps:
            continue
        seen, found = keys_seen(model.eval(), held), nats(model.eval(), held)
        results["measured"].append({"step": step, "keys": seen, "dms": found})
        save("delayed_eviction", results)
        print(step, f"{seen:.1f} keys, {statistics.mean(found):.4f} nats", flush=True)
        if time.monotonic() - start > 60 * given.minutes:
            break
    memwrap.unwrap(model)
    print(f"full {statistics.mean(full):.4f}")
    for one in results["measured"]:
        one["window_keys"], one["window"] = windowed(base, held, one["keys"])
        ours, theirs = (paired(one[n], full) for n in ("dms", "window"))
        gap = paired(one["dms"], one["window"])
        print(
            f"{one['keys']:.0f} keys: dms {ours[0]:+.4f} +- {ours[1]:.4f}, window of "
            f"{one['window_keys']} {theirs[0]:+.4f} +- {theirs[1]:.4f}, "
            f"between {gap[0]:+.4f} +- {gap[1]:.4f}", flush=True,
        )  # fmt: skip
    save("delayed_eviction", results)


if __name__ == "__main__":
    main()
