"""A text read once or twice by the shipped recall model, which was trained with one pass.

    python benchmarks/read_twice.py [--rows 512] [--seed 0]

Pairs with distinct keys, a segment each, then four queries. "Reversed" reads the pairs from the
last to the first before it reads them in their order. What is asked is the same for all three.
Errors are those of the mean over rows; the gains are of the same rows, and so are their errors.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import save
from torch import Tensor

import memwrap
from memwrap.assets import asset
from memwrap.tasks.associative import AssociativeTask
from memwrap.training.recall import recall_tasks
from memwrap.training.recipe import load_recipe

MODEL, PAIRS, QUERIES = "armt-recall", (16, 32, 64), 4


@torch.no_grad()
def answered(model: Any, task: AssociativeTask, rows: int, pairs: int, seed: int) -> dict[str, Any]:
    """Give the share of right answers of every row `(rows,)` by way of reading."""
    generator = torch.Generator().manual_seed(1000 * seed + pairs)
    ids, labels = task.sample(rows, generator, num_pairs=pairs, num_queries=QUERIES)
    text, queries = ids.split([pairs * task.segment_size, QUERIES * task.segment_size], 1)
    wanted = labels[:, text.shape[1] + 1 :]
    backwards = text.unflatten(1, (pairs, -1)).flip(1).flatten(1)
    states = {
        "once": model.read(text),
        "twice": model.read(text, passes=2),
        "reversed, then once": model.read(text, state=model.read(backwards)),
    }
    asked = wanted != -100

    def right(logits: Tensor) -> Tensor:
        same = (logits[:, :-1].argmax(-1) == wanted) | ~asked
        parts = torch.nn.functional.pad(same, (1, 0), value=True)
        return parts.unflatten(1, (QUERIES, -1)).all(-1).double().mean(1)

    return {name: right(model(queries, cache=s).logits) for name, s in states.items()}


def told(values: Tensor) -> dict[str, float]:
    """Mean and standard error."""
    return {"mean": float(values.mean()), "error": float(values.std() / len(values) ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = asset(MODEL)
    recipe = load_recipe(folder / "recipe.yaml").recall
    model = memwrap.load(MODEL).eval()
    task = next(t for t in recall_tasks(recipe, model.config.vocab_size) if not t.rewrite)
    results = {}
    for pairs in PAIRS:
        parts = answered(model, task, given.rows, pairs, given.seed)
        once = parts["once"]
        results[str(pairs)] = {
            name: {**told(values), "gain": told(values - once)} for name, values in parts.items()
        }
        print(pairs, results[str(pairs)], flush=True)
    save("read_twice", {**vars(given), "queries": QUERIES, "chance": task.chance, **results})


if __name__ == "__main__":
    main()
