"""Plots of results, as PNG files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from memwrap.evaluation.controls import MEMORY, OFF
from memwrap.evaluation.conversations import MEASURES, ConversationsResult
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.recall import RecallResult
from memwrap.evaluation.suite import wilson
from memwrap.io.plotting import COLOURS, MARKERS, _figure, _save


def plot_perplexity(result: PerplexityResult, path: str | Path, title: str = "") -> None:
    """Plot NLL by position, below it each curve's difference to the memory switched off, and below
    that how large the memory's sums become, a line a layer."""
    figure, panels = _figure(3 if result.norms else 2)
    upper, lower = panels[:2]
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
    panels[-1].set_xlabel("position in the document (tokens)")
    lower.axhline(0, color="black", linewidth=0.6)
    for name in [name for name in (result.norms or [{}])[0] if name != "tokens"]:
        for index, layer in enumerate(result.norms[0][name]):
            points = [(at["tokens"], at[name][layer]) for at in result.norms]
            style = {"color": COLOURS[index % len(COLOURS)], "label": f"layer {layer}"}
            panels[2].plot(*zip(*points, strict=True), **style)
        panels[2].set_ylabel(f"norm of {name}'s sums")
        panels[2].set_yscale("log")
        panels[2].legend(fontsize=7, ncols=4)
    for axis in panels:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    _save(figure, path)


def plot_recall(results: dict[str, RecallResult], path: str | Path) -> None:
    """Plot accuracy by distance, one panel a result, with controls and chance."""
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


def plot_conversations(result: ConversationsResult, path: str | Path) -> None:
    """Plot what was answered by number of turns, a panel a kind of question, a line a reader."""
    shown = [measure for measure in MEASURES if measure[1] == "right"]
    figure, axes = _figure(len(shown))
    for axis, (kind, counted, name) in zip(axes, shown, strict=True):
        for index, curve in enumerate(result.curves()):
            counts = [(n, *result.count(n, curve, kind, counted)) for n in result.turns()]
            shares = [(n, right / count, count) for n, right, count in counts if count]
            points = [(n, share, *wilson(share, count)) for n, share, count in shares]
            _draw_shares(axis, index, curve, points)
        axis.set_title(name)
        axis.set_ylabel("share of questions")
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("turns of the user")
    _save(figure, path)


def plot_lengths(cells: list[Any], path: str | Path) -> None:
    """Plot accuracy of one task by length, a line a curve; `cells` as in `suite.SuiteResult`."""
    figure, (axis,) = _figure(1)
    for index, curve in enumerate(dict.fromkeys(cell.curve for cell in cells)):
        points = [(c.length, c.accuracy, c.low, c.high) for c in cells if c.curve == curve]
        _draw_shares(axis, index, curve, points)
    axis.set_ylabel("accuracy")
    axis.set_xlabel("tokens")
    axis.legend(fontsize=8)
    _save(figure, path)


def _draw_shares(
    axis: Any, index: int, label: str, points: list[tuple[int, float, float, float]]
) -> None:
    """Draw a line of shares by length with their bounds: where, the share, least and most."""
    places, shares, least, most = zip(*points, strict=True) if points else ((),) * 4
    bounds = [
        [max(0.0, share - low) for share, low in zip(shares, least, strict=True)],
        [max(0.0, high - share) for share, high in zip(shares, most, strict=True)],
    ]
    axis.errorbar(
        places, shares, yerr=bounds, label=label, color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)], capsize=2,
    )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)


def plot_costs(cells: list[Any], path: str | Path) -> None:
    """Plot seconds a text and peak memory of one task by length, a line a curve."""
    figure, panels = _figure(2)
    for index, curve in enumerate(dict.fromkeys(cell.curve for cell in cells)):
        points = [cell for cell in cells if cell.curve == curve]
        seconds = [cell.seconds / cell.samples for cell in points]
        peaks = [math.nan if c.peak_bytes is None else c.peak_bytes / 1e6 for c in points]
        for panel, values in zip(panels, (seconds, peaks), strict=True):
            panel.plot(
                [cell.length for cell in points],
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
    """Plot accuracy of one task by depth of the fact (down) and length (across), a panel a
    curve."""
    curves = list(dict.fromkeys(cell.curve for cell in cells))
    lengths = sorted({cell.length for cell in cells})
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (2.2 * len(curves) + 1.2, 3.0)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for curve, panel in zip(curves, panels, strict=True):
        depths = {cell.length: cell.depth for cell in cells if cell.curve == curve}
        parts = len(next(iter(depths.values())))
        grid = [[depths.get(n, [math.nan] * parts)[d] for n in lengths] for d in range(parts)]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        panel.set_title(curve, fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7, rotation=60)
        panel.set_yticks(range(parts), [f"{(d + 0.5) / parts:.0%}" for d in range(parts)])
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels), label="accuracy")
    _save(figure, path)
