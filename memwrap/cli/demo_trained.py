"""The demo's part about a trained memory: a shipped adapter, beside itself switched off."""

from __future__ import annotations

from typing import Any

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.suite import evaluate_tasks

ADAPTER = "armt-facts"
"""The name of the shipped memory, trained by the recipe `armt_facts`; it is left out where there is
none."""
TASK = "told_facts"
SEGMENTS = (2, 5, 17)
CONTROLS = ("memory off", "memory shuffled", "base, window + sinks")
SAMPLES = 20


def trained(base: Any, tokenizer: Any) -> dict[str, Any] | None:
    """Measure the shipped memory on texts of some segments with facts in them.

    Args:
        base: the model that it was trained on.
        tokenizer: its tokenizer.

    Returns:
        Accuracies by curve and length, or None if no memory is shipped.
    """
    place = asset(ADAPTER)
    if place is None:
        return None
    model = memwrap.load(place, base).eval()
    lengths = [model.segment_size * count - 1 for count in SEGMENTS]
    window = 2 * model.segment_size  # what a state of the same size could keep is less
    result = evaluate_tasks(
        model, tokenizer, [TASK], lengths, samples=SAMPLES, controls=CONTROLS, window=window,
        progress=False,
    )  # fmt: skip
    memwrap.unwrap(model)
    curves: dict[str, dict[str, float]] = {}
    for cell in result.cells:
        curves.setdefault(cell.curve, {})[str(cell.length)] = cell.accuracy
    return {"samples": SAMPLES, "segment": model.segment_size, "curves": curves}


__all__ = ["ADAPTER", "trained"]
