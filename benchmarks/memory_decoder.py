"""A Memory Decoder of half the tiny LM's layers, beside the store that it learned from.

    python memory_decoder.py [STEPS [FILES [ROWS]]]

Held-out files of the standard library, which the LM has not seen: the first 60% of each go into the
store, shares and temperatures are tuned on the next 20%, the last 20% are measured. The decoder
begins with three of the LM's six layers and follows the store; its control begins the same and
learns the same text without it. `results/memory_decoder.json` keeps what came out, and the table is
printed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.data.documents import load_documents
from memwrap.evaluation.knnlm import tune
from memwrap.memories.memory_decoder import MemoryDecoderConfig
from memwrap.retrieval.datastore import add_document
from memwrap.stores import FaissStore
from memwrap.training.decoder_training import (
    DecoderTraining,
    best_weight,
    lessons_of,
    mixed_nats,
    token_likelihoods,
    train_decoder,
)

SEGMENT, TOKENS, LAYERS, SEED = 512, 6000, 3, 0
CUTS = (0.6, 0.8)
STEPS, FILES, ROWS = 40, 8, 4


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)


def texts(count: int) -> dict[str, tuple[Tensor, ...]]:
    """Of every file what goes into the store, what is tuned on and what is measured."""
    words, found = AutoTokenizer.from_pretrained(asset("tiny-lm")), {}
    for document in load_documents("stdlib", "test"):
        ids = torch.tensor(words(document.text, verbose=False)["input_ids"])
        if len(ids) >= TOKENS and len(found) < count:
            found[document.name] = ids[:TOKENS].tensor_split([int(c * TOKENS) for c in CUTS])
    return found


def with_store(parts: dict[str, tuple[Tensor, ...]], folder: str) -> tuple[dict[str, Any], list]:
    """The kNN-LM: nats of every file with and without it, and what it says of its own text."""
    model: Any = memwrap.wrap(base(), "knnlm", segment_size=SEGMENT, top_k=64).eval()
    memory = model.memories["knnlm"]
    store = FaissStore(memory.width, path=f"{folder}/store")
    start = time.perf_counter()
    for name, (stored, *_) in parts.items():
        add_document(model, store, stored, name)
    store.build(progress=False)
    memory.attach(store)
    tuning = tune(model, [tuned for _, tuned, _ in parts.values()], progress=False)
    best: Any = {"weights": (0.0, tuning.best.interpolation),
                 "temperatures": (tuning.best.temperature,)}  # fmt: skip
    found = [tune(model, [row], **best, progress=False) for *_, row in parts.values()]
    built = time.perf_counter() - start
    lessons = list(lessons_of(model, {name: part[0] for name, part in parts.items()}, 64))
    about = {
        "entries": len(store), "bytes": store.disk_bytes, "tuned": tuning.tuned(),
        "seconds": built, "seconds_for_lessons": time.perf_counter() - start - built,
        "base": [one.base for one in found],
        "mixed": [one.settings[-1].nats for one in found],
    }  # fmt: skip
    store.close()
    return about, lessons


def with_decoder(
    parts: dict[str, tuple[Tensor, ...]], lessons: list, heat: float, **settings: Any
) -> dict[str, Any]:
    """A decoder: nats of every file, mixed and alone; `steps=0`: as it begins."""
    config = MemoryDecoderConfig(segment_size=SEGMENT, num_layers=LAYERS)
    model: Any = memwrap.wrap(base(), config)
    decoder = model.memories["memory_decoder"]
    decoder.start_from(model.backbone)
    start = time.perf_counter()
    losses: list = []
    if settings["steps"]:
        losses = train_decoder(model, lessons, DecoderTraining(**settings), heat)
    spent = time.perf_counter() - start
    model.eval()
    weight, _ = best_weight([token_likelihoods(model, row) for _, row, _ in parts.values()])
    pairs = [token_likelihoods(model, row) for *_, row in parts.values()]
    return {
        **settings, "weight": weight, "seconds": spent, "losses": losses[-1:],
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "base": [float(mixed_nats(*pair, 0.0).mean()) for pair in pairs],
        "mixed": [float(mixed_nats(*pair, weight).mean()) for pair in pairs],
        "alone": [float(-own.mean()) for _, own in pairs],
    }  # fmt: skip


def row_of(label: str, nats: list[float], bases: list[float], store: list[float]) -> str:
    gains = [b - n for b, n in zip(bases, nats, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    whole = statistics.mean(b - s for b, s in zip(bases, store, strict=True))
    mean = statistics.mean(gains)
    return (f"| {label} | {statistics.mean(nats):.4f} | {mean:+.4f} ± {error:.4f} "
            f"| {mean / whole:.0%} |")  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    given = [int(word) for word in sys.argv[1:]]
    steps, files, rows = [*given, *(STEPS, FILES, ROWS)[len(given) :]]
    torch.manual_seed(SEED)
    parts, start = texts(files), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store, lessons = with_store(parts, folder)
    heat, runs = store["tuned"].get("temperature", 1.0), {}
    bases, mixed = store["base"], store["mixed"]

    def tell(label: str, run: dict[str, Any]) -> None:
        runs[label] = run
        print(row_of(f"decoder, {label}, share {run['weight']}", run["mixed"], bases, mixed))
        print(row_of(f"the same alone, {label}", run["alone"], bases, mixed), flush=True)

    print("| | nats a token | gain | of the store's |\n|---|---|---|---|")
    print(row_of("base", bases, bases, mixed))
    print(row_of(f"kNN-LM, {store['tuned']}", mixed, bases, mixed), flush=True)
    tell("as it begins", with_decoder(parts, lessons, heat, steps=0))
    for label, share in (("distilled", 0.5), ("text alone", 0.0)):
        settings = {"steps": steps, "batch_size": rows, "imitation": share, "seed": SEED}
        tell(label, with_decoder(parts, lessons, heat, **settings))
    save("memory_decoder", {
        "about": "a Memory Decoder of three of tiny-lm's layers and the store it learned from",
        "command": f"python {Path(__file__).name} {steps} {files} {rows}", "files": list(parts),
        "tokens_each": TOKENS, "cuts": CUTS, "segment_size": SEGMENT, "store": store, "runs": runs,
        "seconds": time.perf_counter() - start,
    })  # fmt: skip


if __name__ == "__main__":
    main()
