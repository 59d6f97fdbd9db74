"""Landmark attention beyond its training length, beside base, window and InfLLM.

    memwrap train landmark_recall_tiny
    python benchmarks/landmark.py recall runs/landmark_recall_tiny
    memwrap train landmark_passkey_tiny
    python benchmarks/landmark.py tasks runs/landmark_passkey_tiny [--samples 10] [--length 256]
    python benchmarks/landmark_table.py

`recall`: associative recall by the number of pairs and how deep the pair asked for lies; window and
InfLLM stand around the same trained backbone. `tasks`: passkey and RULER at 1, 2, 4, 8
and 16 times the longest text of training; InfLLM, window and base are the same trained backbone.
Results go to `results/landmark.json`; of `tasks`, what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from common import RESULTS, save
from transformers import AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.controls import CURVES, MEMORY, OFF, SHUFFLED, TRUNCATED
from memwrap.evaluation.recall import evaluate_recall
from memwrap.evaluation.suite import evaluate_tasks
from memwrap.training.recall import recall_tasks
from memwrap.training.recipe import load_recipe

PAIRS, DEPTHS = (8, 16, 32), (0.1, 0.3, 0.5, 0.7, 0.9)
AROUND: dict[str, dict[str, Any]] = {
    "window": {"window_size": 20, "num_sinks": 4},
    "infllm": {"window_size": 20, "num_sinks": 4, "block_size": 4, "top_k": 8},
}
INFLLM: dict[str, Any] = {
    "segment_size": 64, "window_size": 256, "num_sinks": 4, "block_size": 32, "top_k": 4,
}  # fmt: skip
TIMES = (1, 2, 4, 8, 16)
# RULER's tasks that can be made offline exactly, at lengths that they fit in.
TASKS: dict[str, tuple[int, ...]] = {
    "passkey": TIMES, "niah_single_1": (2, 8), "niah_multikey_2": (2, 8), "niah_multikey_3": (2,),
    "fwe": (2,), "vt": (4,), "cwe": (8,),
}  # fmt: skip


def training_of(folder: Path) -> dict[str, Any]:
    """What the model was trained on, how long, and the loss in the beginning and at the end."""
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    losses = [row for row in log if "loss" in row]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    return {
        "steps": losses[-1]["step"],
        "seconds": losses[-1]["seconds"],
        "first_loss": losses[0]["loss"],
        "last_loss": sum(row["loss"] for row in losses[-3:]) / len(losses[-3:]),
        "recipe": {name: recipe.get(name) for name in ("memory", "tasks", "recall")},
        "batch_size": recipe["trainer"]["batch_size"],
    }


def recall(folder: Path, samples: int) -> dict[str, Any]:
    """Accuracy by pairs and depth: cells like those of the task suite."""
    model = memwrap.load(folder)
    task = recall_tasks(load_recipe(folder / "recipe.yaml").recall, model.config.vocab_size)[-1]
    cells: list[dict[str, Any]] = []

    def measure(name: str, model: Any, controls: tuple[str, ...]) -> None:
        for pairs in PAIRS:
            distances = tuple(max(1, round((1 - depth) * pairs)) for depth in DEPTHS)
            found = evaluate_recall(
                model, task, distances=distances, pairs=pairs, samples=samples,
                controls=controls, progress=False,
            )  # fmt: skip
            for curve, accuracy in found.accuracy.items():
                own = name if curve == MEMORY else curve
                cells.append({"curve": own, "pairs": pairs, "depth": accuracy})
            print(found.table(), flush=True)

    measure("landmark", model, (OFF, SHUFFLED, TRUNCATED))
    base = memwrap.unwrap(model)
    for name, settings in AROUND.items():
        other = memwrap.wrap(base, name, segment_size=task.segment_size, **settings)
        measure(name, other, ())
        base = memwrap.unwrap(other)
    return {
        "training": training_of(folder), "samples": samples, "depths": DEPTHS, "around": AROUND,
        "cells": cells,
    }  # fmt: skip


def tasks(folder: Path, samples: int, length: int, old: dict[str, Any], keep: Any) -> None:
    """Tasks of the evaluation suite; `keep` is given the result so far after every length."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    model = memwrap.load(folder)
    infllm = memwrap.wrap(memwrap.unwrap(memwrap.load(folder)), "infllm", **INFLLM)
    settings = {
        "training": training_of(folder), "length": length, "samples": samples, "infllm": INFLLM
    }  # fmt: skip
    values = old if all(old.get(k) == v for k, v in settings.items()) else {**settings, "cells": []}
    cells = values["cells"]
    for times in TIMES:
        for task, wanted in TASKS.items():
            there = {(cell["task"], cell["length"]) for cell in cells}
            if times not in wanted or (task, times * length) in there:
                continue
            for name, own, controls in (("landmark", model, CURVES[1:]), ("infllm", infllm, ())):
                found = evaluate_tasks(
                    own, tokenizer, [task], [times * length], samples=samples, controls=controls,
                    progress=False,
                )  # fmt: skip
                for cell in found.cells:
                    curve = name if cell.curve == MEMORY else cell.curve
                    cells.append(asdict(cell) | {"curve": curve})
                print(found.table(), flush=True)
            keep(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("recall", "tasks"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    path = RESULTS / "landmark.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results = {k: v for k, v in before.items() if k in ("recall", "tasks")}

    def keep(values: dict[str, Any]) -> None:
        save("landmark", {**results, given.what: values})

    if given.what == "recall":
        keep(recall(given.folder, given.samples or 64))
    else:
        tasks(given.folder, given.samples or 10, given.length, results.get("tasks", {}), keep)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
