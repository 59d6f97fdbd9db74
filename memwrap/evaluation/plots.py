"""Plots of results, as PNG files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from memwrap.evaluation.associative import RecallResult
from memwrap.evaluation.controls import MEMORY, OFF, SHUFFLED, WINDOW
from memwrap.evaluation.perplexity import PerplexityResult
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


def plot_comparison(results: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Memories side by side: nats per token with and without the memory, and recall by distance.

    Args:
        results: of `comparison.read_results`.
        path: of the PNG file.
    """
    figure, (upper, lower) = _figure(2)
    names = [name for name in results if "perplexity" in results[name]]
    curves = [results[name]["perplexity"]["curves"] for name in names]
    for index, label in enumerate((MEMORY, OFF, SHUFFLED)):
        values = [own[label]["overall"] for own in curves]
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


def plot_lengths(cells: list[Any], path: str | Path) -> None:
    """Accuracy of one task by length, a line a curve; `cells` as in `suite.SuiteResult`."""
    figure, (axis,) = _figure(1)
    for index, curve in enumerate(dict.fromkeys(cell.curve for cell in cells)):
        own = [cell for cell in cells if cell.curve == curve]
        spread = [[c.accuracy - c.low for c in own], [c.high - c.accuracy for c in own]]
        axis.errorbar(
            [c.length for c in own],
            [c.accuracy for c in own],
            yerr=[[max(0.0, value) for value in side] for side in spread],
            label=curve,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=2,
        )
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("accuracy")
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_costs(cells: list[Any], path: str | Path) -> None:
    """Seconds a text and peak memory of one task by length, a line a curve."""
    figure, panels = _figure(2)
    for index, curve in enumerate(dict.fromkeys(cell.curve for cell in cells)):
        own = [cell for cell in cells if cell.curve == curve]
        seconds = [cell.seconds / cell.samples for cell in own]
        peaks = [math.nan if c.peak_bytes is None else c.peak_bytes / 1e6 for c in own]
        for panel, values in zip(panels, (seconds, peaks), strict=True):
            panel.plot(
                [cell.length for cell in own],
                values,
                label=curve,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
            )
    for panel, label in zip(panels, ("seconds a text", "peak memory, MB"), strict=True):
        panel.set_ylabel(label)
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    panels[-1].set_xlabel("tokens")
    _save(figure, path)


def plot_depths(cells: list[Any], path: str | Path) -> None:
    """Accuracy of one task by depth of the fact (down) and length (across), a panel a curve."""
    curves = list(dict.fromkeys(cell.curve for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (2.2 * len(curves) + 1.2, 3.0)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for curve, panel in zip(curves, panels, strict=True):
        found = {cell.length: cell.depth for cell in cells if cell.curve == curve}
        parts = len(next(iter(found.values())))
        grid = [[found.get(n, [math.nan] * parts)[d] for n in lengths] for d in range(parts)]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        panel.set_title(curve, fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7, rotation=60)
        panel.set_yticks(range(parts), [f"{(d + 0.5) / parts:.0%}" for d in range(parts)])
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels), label="accuracy")
    _save(figure, path)
