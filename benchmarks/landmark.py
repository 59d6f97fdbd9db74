"""Landmark attention on retrieval tasks beyond its training length, beside base, window, InfLLM.

    memwrap train landmark_passkey_tiny
    python benchmarks/landmark.py runs/landmark_passkey_tiny [--samples 10] [--length 128]
    python benchmarks/landmark_table.py

Every task is read at 1, 2, 4, 8 and 16 times the longest text of training, RULER's needles from
where they fit. "infllm" is the untrained base with InfLLM. Results go to `results/landmark.json`
after every length, and what is there already is not measured again.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.controls import CURVES, MEMORY
from memwrap.evaluation.suite import evaluate_tasks

INFLLM: dict[str, Any] = {
    "segment_size": 64, "window_size": 256, "num_sinks": 4, "block_size": 32, "top_k": 4,
}  # fmt: skip
TIMES = (1, 2, 4, 8, 16)
TASKS: dict[str, tuple[int, ...]] = {
    "passkey": TIMES, "copy": TIMES, "niah_single_1": (2, 8), "niah_multikey_2": (2, 8),
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
        "memory": recipe["memory"],
        "tasks": recipe["tasks"],
        "batch_size": recipe["trainer"]["batch_size"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--tasks", default=",".join(TASKS))
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    model = memwrap.load(given.folder)
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    infllm = memwrap.wrap(base, "infllm", **INFLLM)
    path = RESULTS / "landmark.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    settings = {
        "training": training_of(given.folder), "length": given.length, "samples": given.samples,
        "infllm": INFLLM,
    }  # fmt: skip
    if any(values.get(name) != value for name, value in settings.items()):
        values = {**settings, "cells": []}
    cells = values["cells"]
    for times in TIMES:
        for task in given.tasks.split(","):
            length = times * given.length
            there = {(cell["task"], cell["length"]) for cell in cells}
            if times not in TASKS[task] or (task, length) in there:
                continue
            for name, own, controls in (("landmark", model, CURVES[1:]), ("infllm", infllm, ())):
                found = evaluate_tasks(
                    own, tokenizer, [task], [length], samples=given.samples, controls=controls,
                    progress=False,
                )  # fmt: skip
                for cell in found.cells:
                    curve = name if cell.curve == MEMORY else cell.curve
                    cells.append(asdict(cell) | {"curve": curve})
                print(found.table(), flush=True)
            save("landmark", {k: v for k, v in values.items() if k not in ("benchmark", "machine")})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
