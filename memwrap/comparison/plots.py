"""The figure of the comparison of memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memwrap.evaluation.controls import MEMORY, OFF, SHUFFLED, WINDOW
from memwrap.io.plotting import COLOURS, MARKERS, _figure, _save


def plot_comparison(results: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Plot memories side by side: nats per token with and without the memory, and recall by
    distance.

    Args:
        results: of `comparison.read_results`.
        path: of the PNG file.
    """
    figure, (upper, lower) = _figure(2)
    names = [name for name in results if "perplexity" in results[name]]
    curves = [results[name]["perplexity"]["curves"] for name in names]
    for index, label in enumerate((MEMORY, OFF, SHUFFLED)):
        values = [curve[label]["overall"] for curve in curves]
        upper.plot(names, values, MARKERS[index], color=COLOURS[index], label=label)
    upper.axhline(
        curves[0][WINDOW]["overall"], color="black", linestyle=":", label=f"{WINDOW}, untrained"
    )
    upper.set_ylabel("nats per token")
    upper.tick_params(axis="x", rotation=45)
    upper.legend(fontsize=8)
    for index, name in enumerate(names):
        recall = results[name]["recall"]["rewrite"]
        lower.plot(
            recall["distances"],
            recall["accuracy"][MEMORY],
            label=name,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[(index // len(COLOURS)) % len(MARKERS)],
            linestyle=("-", "--", "-.")[index // len(COLOURS) % 3],
            markersize=4,
        )
    lower.axhline(recall["chance"], color="black", linestyle=":", label="chance")
    lower.set_xscale("log", base=2)
    lower.set_ylabel("accuracy (rewrite)")
    lower.set_xlabel("segments between a pair and its question")
    lower.legend(fontsize=7, ncols=3)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    _save(figure, path)
