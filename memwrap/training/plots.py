"""Figures of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memwrap.io.plotting import COLOURS, _figure, _save


def plot_figures(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Plot numbers of a memory over a training: one panel a figure, one line a head.

    Args:
        rows: `{"step": 10, "infini.gate": [[0.1, 0.2], ...]}`, values by layer and head; the last
            row has all names.
        path: of the PNG file.
    """
    names = [name for name in rows[-1] if name != "step"]
    figure, panels = _figure(len(names))
    for name, panel in zip(names, panels, strict=True):
        known = [row for row in rows if name in row]  # none has norms before the first step
        steps = [row["step"] for row in known]
        for layer, heads in enumerate(rows[-1][name]):
            colour = COLOURS[layer % len(COLOURS)]
            for head in range(len(heads)):
                values = [row[name][layer][head] for row in known]
                label = f"layer {layer}" if head == 0 else None
                panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.8, label=label)
        panel.set_ylabel(name)
        panel.set_xlabel("step")
        if len(rows[-1][name]) <= 16:
            panel.legend(fontsize=7, ncols=4)
    _save(figure, path)
