"""Plots of results, as PNG files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from memwrap.evaluation.associative import RecallResult
from memwrap.evaluation.perplexity import MEMORY, OFF, PerplexityResult
from memwrap.files import replacing

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#999999", "#CC79A7", "#E69F00"]
MARKERS = ["o", "s", "^", "D", "v", "x"]


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * rows + 0.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no window, no global state
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _save(figure: Any, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_perplexity(result: PerplexityResult, path: str | Path, title: str = "") -> None:
    """NLL by position, and below it each curve's difference to the memory switched off."""
    figure, (upper, lower) = _figure(2)
    centres = [(a + b) / 2 for a, b in pairwise(result.edges)]
    reference = result.curves.get(OFF, result.curves[MEMORY])
    for index, (name, curve) in enumerate(result.curves.items()):
        style = {
            "label": name,
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4,
        }
        upper.errorbar(centres, curve.mean, yerr=curve.error, capsize=2, **style)
        difference = [a - b for a, b in zip(curve.mean, reference.mean, strict=True)]
        small = [d if abs(d) < 0.5 else math.nan for d in difference]
        lower.plot(centres, small, **style)
    upper.set_ylabel("nats per token")
    upper.set_title(title or f"{result.documents} held-out documents")
    upper.legend(fontsize=8)
    lower.set_ylabel(f"minus {OFF if OFF in result.curves else MEMORY}")
    lower.set_xlabel("position in the document (tokens)")
    lower.axhline(0, color="black", linewidth=0.6)
    for axis in (upper, lower):
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_recall(results: dict[str, RecallResult], path: str | Path) -> None:
    """Accuracy by distance, one panel a result, with controls and chance."""
    figure, axes = _figure(len(results))
    for axis, (title, result) in zip(axes, results.items(), strict=True):
        for index, (name, values) in enumerate(result.accuracy.items()):
            axis.errorbar(
                result.distances,
                values,
                yerr=[result.error(v) for v in values],
                label=name,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                capsize=2,
            )
        axis.axhline(result.chance, color="black", linestyle=":", label="chance")
        axis.set_xscale("log", base=2)
        axis.set_ylim(-0.03, 1.03)
        axis.set_ylabel("accuracy")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("segments between a pair and its query")
    _save(figure, path)


def plot_figures(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Learned numbers of a memory over a training: one panel a figure, one line a head.

    Args:
        rows: `{"step": 10, "infini.gate": [[0.1, 0.2], ...]}`, values by layer and head.
        path: of the PNG file.
    """
    names = [name for name in rows[-1] if name != "step"]
    figure, panels = _figure(len(names))
    steps = [row["step"] for row in rows]
    for name, panel in zip(names, panels, strict=True):
        for layer, heads in enumerate(rows[-1][name]):
            colour = COLOURS[layer % len(COLOURS)]
            for head in range(len(heads)):
                values = [row[name][layer][head] for row in rows]
                label = f"layer {layer}" if head == 0 else None
                panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.8, label=label)
        panel.set_ylabel(name)
        panel.set_xlabel("step")
        if len(rows[-1][name]) <= 16:
            panel.legend(fontsize=7, ncols=4)
    _save(figure, path)
