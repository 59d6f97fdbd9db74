"""The demo's part about a trained memory: a shipped adapter, beside itself switched off, and the
beginning of its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.suite import evaluate_tasks
from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe

ADAPTER = "armt-facts"
"""The name of the shipped memory, trained by the recipe `armt_facts`; it is left out where there is
none."""
TASK = "told_facts"
SEGMENTS = (2, 5, 17)
CONTROLS = ("memory off", "memory shuffled", "base, truncated")
SAMPLES = 10
RECIPE = "armt_facts"
"""What the shipped memory was trained by."""
CHANGES: tuple[str, ...] = ()
"""How the recipe is run from scratch, beside its time."""


def shipped() -> Path | None:
    """Find the shipped memory."""
    return asset(ADAPTER)


def trained(base: Any, tokenizer: Any) -> dict[str, Any] | None:
    """Measure the shipped memory on texts of some segments with facts in them.

    Args:
        base: the model that it was trained on.
        tokenizer: its tokenizer.

    Returns:
        Accuracies by curve and length, or None if no memory is shipped.
    """
    place = shipped()
    if place is None:
        return None
    model = memwrap.load(place, base).eval()
    lengths = [model.segment_size * count - 1 for count in SEGMENTS]
    window = 2 * model.segment_size  # tokens; a state of the same size could keep fewer
    result = evaluate_tasks(
        model, tokenizer, [TASK], lengths, samples=SAMPLES, controls=CONTROLS, window=window,
        progress=False,
    )  # fmt: skip
    memwrap.unwrap(model)
    curves: dict[str, dict[str, float]] = {}
    for cell in result.cells:
        curves.setdefault(cell.curve, {})[str(cell.length)] = cell.accuracy
    return {"samples": SAMPLES, "segment": model.segment_size, "curves": curves}


def trained_anew(base: Any, tokenizer: Any, folder: Path, minutes: float) -> dict[str, Any]:
    """Run the recipe from scratch for a short while.

    Args:
        base: the model that it trains on, for the look at what came out.
        tokenizer: its tokenizer.
        folder: for the run.
        minutes: of training.

    Returns:
        Steps done and planned, the first and the last loss, and the share of facts known at the
        shortest length.
    """
    changes = [f"output={folder}", "overwrite=true", f"trainer.max_minutes={minutes:.3f}", *CHANGES]
    run_recipe(load_recipe(RECIPE, changes))
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    log = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    model = memwrap.load(folder, base).eval()
    length = model.segment_size * SEGMENTS[0] - 1
    result = evaluate_tasks(
        model, tokenizer, [TASK], [length], samples=SAMPLES, controls=(), progress=False
    )
    memwrap.unwrap(model)
    return {
        "steps": facts["steps"], "planned": facts["planned_steps"], "seconds": facts["seconds"],
        "first_loss": losses[0], "last_loss": losses[-1], "tokens": length,
        "known": result.cells[0].accuracy, "samples": SAMPLES,
    }  # fmt: skip


def said_of(training: dict[str, Any]) -> str:
    """Say in a sentence what a short training came to, and what it cannot show."""
    return (
        f"Trained from scratch for {training['seconds']:.0f} s, {training['steps']} of the "
        f"recipe's {training['planned']} steps, the loss went from {training['first_loss']:.2f} to "
        f"{training['last_loss']:.2f} and {training['known']:.2f} of {training['samples']} facts "
        f"are known at {training['tokens']} tokens: so few steps learn the form of an answer and "
        "to read the segment before; facts of many segments ago take all of them, as in the table."
    )


__all__ = ["ADAPTER", "said_of", "shipped", "trained", "trained_anew"]
