"""Figures that are drawn without a display and written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memwrap.io.atomic_files import replacing

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
