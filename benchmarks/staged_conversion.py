"""A conversion in stages on SmolLM2-135M: is it better than its window alone?

    python benchmarks/staged_conversion.py [--memory ahn] [--steps 40 24 12] [--seed 0]
    python benchmarks/staged_conversion.py --memory window    # the control, the last two stages

The stages are those of `memwrap linearize`: mixers, logits, long text, with so many steps of 1,024,
1,024 and up to 2,048 tokens. Trained on the train split of Python's documentation and library, one
thread. Measured on held-out documents (test split): nats per token of the converted model, of its
window and its recurrence alone, of the base with the same window and sinks untrained, and of the
base with full attention; with the paired difference over documents. The control is a window
without a recurrence, with the same adapters, data and steps. A run that was stopped goes on from
its last checkpoint; `results/staged_conversion.json` has an entry a memory and seed.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation import run as evaluation
from memwrap.training.linearize_recipe import linearize_recipe
from memwrap.training.recipe import Recipe, resolve
from memwrap.training.stages import run

NAME = "staged_conversion"
EDGES = (0, 64, 512, 1024, 2048)


def recipe_of(given: Any, steps: dict[str, int], folder: Path) -> Recipe:
    """The command's recipe; for a window alone, which nothing linearizes, the last two stages."""
    words = [
        f"window_size={given.window}", *given.settings, f"trainer.seed={given.seed}",
        "trainer.device=cpu", "trainer.save_every=4", "trainer.log_every=2", "data.limit=150",
        *(f"stages.{name}.trainer.steps={count}" for name, count in steps.items()),
    ]  # fmt: skip
    memory = given.memory if given.memory != "window" else "ahn"
    recipe = linearize_recipe(given.model, memory, list(steps), "stdlib", folder, words)
    if given.memory != "window":
        return recipe
    values = recipe.to_dict()
    kept = ("segment_size", "window_size", "num_sinks")
    values["memory"] = {"name": "window", **{k: values["memory"][k] for k in kept}}
    return resolve(values, Path("the control"))


@torch.no_grad()
def nats(model: Any, rows: list[Tensor], branch: str | None = None) -> Tensor:
    """Surprise of every token but the first, `(documents, T - 1)`."""
    found = []
    memories = [m for m in getattr(model, "memories", {}).values() if m.branches]
    for row in rows:
        if branch is None:
            logits = model(row[None, :-1]).logits[0]
        else:
            with memories[0].only(branch):
                logits = model(row[None, :-1]).logits[0]
        logs = logits.float().log_softmax(-1)
        found.append(-logs.gather(1, row[1:, None])[:, 0])
    return torch.stack(found)


def measured(given: Any, folder: Path, rows: list[Tensor]) -> dict[str, Tensor]:
    """All curves."""
    place: Any = asset(given.model) or given.model
    base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    curves = {"base, full attention": nats(base, rows)}
    model: Any = memwrap.load(folder).eval()
    config = model.memory_configs[0]
    window = memwrap.wrap(
        base, "window", segment_size=config.segment_size, window_size=config.window_size,
        num_sinks=4,
    ).eval()  # fmt: skip
    curves["base, window + sinks"] = nats(window, rows)
    base = memwrap.unwrap(window)
    curves["converted"] = nats(model, rows)
    if given.memory != "window":
        memory = next(iter(model.memories.values()))
        for branch in memory.branches:
            curves[f"converted, only {branch}"] = nats(model, rows, branch)
        fresh = memwrap.wrap(base, config).eval()
        curves["untrained conversion"] = nats(fresh, rows)
    return curves


def summary(curves: dict[str, Tensor]) -> dict[str, Any]:
    """Means with their standard errors over documents, by position, and paired differences."""
    table: dict[str, Any] = {}
    reference = curves["base, window + sinks"].mean(1)
    for name, values in curves.items():
        means = values.mean(1)
        gaps = means - reference
        table[name] = {
            "nats": float(means.mean()), "error": float(means.std() / len(means) ** 0.5),
            "by_position": {
                f"{a}-{b}": float(values[:, a:b].mean())
                for a, b in pairwise(EDGES) if a < values.shape[1]
            },
            "minus_window": float(gaps.mean()),
            "minus_window_error": float(gaps.std() / len(gaps) ** 0.5),
            "documents": means.tolist(),
        }  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="ahn")
    parser.add_argument("--settings", nargs="*", default=[])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs=3, default=[40, 24, 12])
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1025)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/staged_conversion")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps = dict(zip(("mixers", "logits", "text"), given.steps, strict=True))
    if given.memory == "window":
        steps.pop("mixers")
    folder = Path(given.folder) / f"{given.memory}_{given.seed}"
    recipe = recipe_of(given, steps, folder)
    recipe.resume = (folder / "stages").is_dir()
    start, wall = time.process_time(), time.monotonic()
    run(recipe)
    spent = {"cpu_seconds": time.process_time() - start, "seconds": time.monotonic() - wall}
    tokenizer = AutoTokenizer.from_pretrained(asset(given.model) or given.model)
    rows = evaluation.documents("stdlib", "test", tokenizer, given.tokens, given.documents)
    table = summary(measured(given, folder, rows))
    about = json.loads((folder / "run.json").read_text())
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text())["runs"] if path.exists() else {}
    entry = {"settings": vars(given), "steps": steps, **spent, "stages": about["stages"]}
    entry |= {"memory": recipe.to_dict()["memory"], "resumed": recipe.resume, "nats": table}
    save(NAME, {"runs": {**old, f"{given.memory}, seed {given.seed}": entry}})
    for name, row in table.items():
        gap = f"{row['minus_window']:+.4f} +- {row['minus_window_error']:.4f}"
        print(f"{name:28s} {row['nats']:.4f} +- {row['error']:.4f}, minus window {gap}", flush=True)


if __name__ == "__main__":
    main()
