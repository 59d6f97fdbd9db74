"""Every memory on the shipped tiny LM with one budget: perplexity by position, recall, costs.

    python benchmarks/memories.py [--only armt,infini] [--steps 60] [--recall-steps 240]
    python benchmarks/memories.py --speed    # how fast each reads, anew, all in one run

Each memory is trained twice by a recipe: on long documents (perplexity) and on associative recall
(keys of one symbol, up to 8 pairs a sample), with the same data, steps, seed and LoRA
(memoryprompt: none, its language model stays as it is). A memory's result is one file in
`results/memories`; `memories_table.py` puts them into the docs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation import run
from memwrap.evaluation.controls import CURVES, OFF, SHUFFLED
from memwrap.evaluation.perplexity import perplexity_by_position
from memwrap.files import write_text
from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe

SEGMENT = 128
DOCUMENTS, TOKENS = 2, 15_360
# What a memory needs beside its defaults: on documents, and on recall.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rmt": ({"num_memory_tokens": 8, "bptt_segments": 8}, {"num_memory_tokens": 4}),
    "armt": (
        {"num_memory_tokens": 8, "d_mem": 32, "bptt_segments": 8},
        {"num_memory_tokens": 1, "d_mem": 64, "layers": [1, 2, 3, 4]},
    ),
    "hmt": (
        {"num_sensory": 8, "cache_size": 64, "d_mem": 64, "bptt_segments": 8},
        {"num_sensory": 0, "cache_size": 16, "d_mem": 64},
    ),
    "autocompressor": (
        {"num_memory_tokens": 4, "memory_size": 256, "bptt_segments": 8},
        {"num_memory_tokens": 1, "memory_size": 16, "bptt_segments": None, "length_spread": 0.0},
    ),
    "memoryprompt": ({"bptt_segments": 8}, {}),
    "infini": (
        {"update": "delta", "gate_init": -2.0, "bptt_segments": 8},
        {"update": "delta", "gate_init": 0.0},
    ),
    "compressive": (
        {"memory_size": 128, "compressed_size": 128, "compression": "conv"},
        {"memory_size": 8, "compressed_size": 8, "bptt_segments": None},
    ),
    "window": ({"window_size": 508}, {"window_size": 16}),
}
LORA = {"r": 16, "alpha": 32, "target_modules": "all-linear"}
DOCUMENT_RECIPE = {
    "task": "finetune",
    "model": {"name": "tiny-lm", "dtype": "float32"},
    "data": {
        "source": "stdlib", "split": "train", "eval_split": None, "max_tokens": 1024,
        "min_tokens": 256,
    },
    "trainer": {
        "batch_size": 4, "learning_rate": 5e-4, "memory_learning_rate": 2e-3, "warmup_steps": 10,
        "schedule": "constant_with_warmup", "precision": "fp32", "seed": 0, "log_every": 10,
        "save_every": None,
    },
}  # fmt: skip
RECALL_RECIPE = {
    "task": "recall",
    "model": {"name": "tiny-lm", "dtype": "float32"},
    "recall": {
        "tasks": ["remember", "rewrite"], "key_size": 1, "value_size": 1, "num_pairs": 8,
        "min_pairs": 2, "num_queries": 4, "curriculum": "0:2,120:4,180:8",
        "ids": [
            4046, 4048, 4057, 4070, 4079, 4077, 4084, 4090, 4076, 4086, 4012, 4033, 4019, 4017,
            4008, 4018, 4032, 4094, 4080,
        ],
    },
    "trainer": {
        "batch_size": 48, "learning_rate": 1e-3, "memory_learning_rate": 3e-3, "warmup_steps": 30,
        "schedule": "constant_with_warmup", "adam_beta2": 0.98, "precision": "fp32", "seed": 0,
        "log_every": 10, "save_every": None,
    },
}  # fmt: skip


def train(name: str, base: dict, memory: dict, steps: int, folder: Path) -> tuple[Path, dict]:
    """Train by a recipe written for the purpose; the folder and its facts."""
    recipe = json.loads(json.dumps(base))
    recipe["memory"] = {"name": name, **memory}
    recipe["output"] = str(folder)
    recipe["trainer"]["steps"] = steps
    if name != "memoryprompt":
        recipe["lora"] = LORA
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run_recipe(load_recipe(path))
    return folder, json.loads((folder / "run.json").read_text())


def perplexity(model: Any, base_too: bool) -> tuple[dict, dict]:
    """Curves by position, and what reading costs."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    rows = run.documents("stdlib", "test", tokenizer, TOKENS, DOCUMENTS)
    controls = CURVES[1:] if base_too else (OFF, SHUFFLED)
    result = perplexity_by_position(model, rows, controls=controls, progress=False)
    start = time.perf_counter()
    state = model.read(torch.stack(rows)[:1])
    costs = {
        "added_parameters": sum(p.numel() for p in model.memory_parameters()),
        "state_bytes": model.close_segment(state).nbytes,
        "read_seconds_per_1k_tokens": (time.perf_counter() - start) / TOKENS * 1000,
    }
    return result.to_dict(), costs


def measure(name: str, steps: int, recall_steps: int) -> dict[str, Any]:
    """Both trainings and both evaluations of one memory."""
    on_documents, on_recall = SETTINGS[name]
    with tempfile.TemporaryDirectory() as scratch:
        documents = {"segment_size": SEGMENT, **on_documents}
        folder, facts = train(name, DOCUMENT_RECIPE, documents, steps, Path(scratch) / "documents")
        curves, costs = perplexity(memwrap.load(folder), base_too=name == "window")
        pairs = {"segment_size": 4, **on_recall}
        folder, recall_facts = train(
            name, RECALL_RECIPE, pairs, recall_steps, Path(scratch) / "recall"
        )
        recall = run.recall(memwrap.load(folder), folder, samples=256)
    return {
        "memory": name,
        "settings": {"documents": documents, "recall": pairs},
        "lora": None if name == "memoryprompt" else LORA,
        "steps": {"documents": steps, "recall": recall_steps},
        "training_seconds": {"documents": facts["seconds"], "recall": recall_facts["seconds"]},
        "training_loss": {"documents": facts["loss"], "recall": recall_facts["loss"]},
        "costs": costs,
        "perplexity": curves,
        "recall": {task: result.to_dict() for task, result in recall.items()},
        "machine": machine(),
    }


def measure_speed(names: list[str], tokens: int = 4096, rounds: int = 3) -> None:
    """Seconds a 1,000 tokens of reading, in turns on one thread, beside the bare base in windows of
    the same length; untrained, since weights do not change the time. Into the results there are."""
    torch.set_num_threads(1)
    ids = torch.randint(10, 4000, (1, tokens), generator=torch.Generator().manual_seed(0))
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name in ("base", *names):
            base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
            base.eval()
            settings = {"segment_size": SEGMENT, **SETTINGS.get(name, ({},))[0]}
            model = base if name == "base" else memwrap.wrap(base, name, **settings)
            with torch.no_grad():
                start = time.perf_counter()
                if name == "base":
                    for part in ids.split(SEGMENT, 1):
                        base.model(input_ids=part, use_cache=False)
                else:
                    model.read(ids)
            seconds = (time.perf_counter() - start) / tokens * 1000
            best[name] = min(seconds, best.get(name, seconds))
    for name in names:
        path = RESULTS / "memories" / f"{name}.json"
        result = json.loads(path.read_text())
        result["costs"]["read_seconds_per_1k_tokens"] = best[name]
        result["costs"]["reading_over_base"] = best[name] / best["base"]
        write_text(path, json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SETTINGS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recall-steps", type=int, default=240)
    parser.add_argument("--speed", action="store_true", help="only the speed of reading")
    arguments = parser.parse_args()
    if arguments.speed:
        there = [n for n in SETTINGS if (RESULTS / "memories" / f"{n}.json").is_file()]
        measure_speed(there)
        return
    for name in arguments.only.split(","):
        start = time.perf_counter()
        result = measure(name, arguments.steps, arguments.recall_steps)
        path = RESULTS / "memories" / f"{name}.json"
        write_text(path, json.dumps(result, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path}", flush=True)


if __name__ == "__main__":
    main()
