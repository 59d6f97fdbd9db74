"""The leaderboard's tables, its three sentences and its picture, all from the cells' numbers."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from memwrap.comparison.board import (
    FREE,
    HEAD,
    LISTED,
    NOTHING,
    SHIPPED,
    TRUNCATED,
    UNTRAINED,
    WHOLE,
    key_of,
    read_cells,
)
from memwrap.evaluation.report import markdown
from memwrap.io.atomic_files import write_text
from memwrap.io.plotting import COLOURS, MARKERS, _figure, _save
from memwrap.io.reading import read_json

Cell = dict[str, Any]
BLOCK = 128
"""Tokens whose mean is one of the paired differences."""
WINDOW = "window"
ABOVE = 1.0
"""Nats above the best that the picture shows."""
PAGE = """# Memories on a real model, at equal bytes

![Bytes of state against nats per token and against facts found](figures/{picture})

{about}

Made by `{command}` with seed {seed} on {machine}.{missing}

## In short

{sentences}

## At equal bytes

{free}

## What needs training

{trained}
"""


def nats_of(cell: Cell) -> float | None:
    """Compute the mean of all tokens of all texts; None where nothing was read."""
    values = [value for text in cell["texts"] for value in text["nats"]]
    return statistics.fmean(values) if values else None


def found_of(cell: Cell) -> tuple[int, int]:
    """Count the facts that were found, and all."""
    hits = [hit for text in cell["texts"] for hit in text["hits"]]
    return sum(hits), len(hits)


def bytes_of(cell: Cell) -> int:
    """Give the most that was kept of a text, at the end of a segment."""
    return max(text["bytes"] for text in cell["texts"])


def _paired(values: list[float], others: list[float]) -> tuple[float, float]:
    gaps = [a - b for a, b in zip(values, others, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.fmean(gaps), error


def nats_gap(cell: Cell, other: Cell) -> tuple[float, float] | None:
    """Compute by how many nats a cell is above another on the texts that both read, and the
    standard error over blocks."""
    common = min(len(cell["texts"]), len(other["texts"]))

    def blocks(of: Cell) -> list[float]:
        return [statistics.fmean(text["nats"][n : n + BLOCK]) for text in of["texts"][:common]
                for n in range(0, len(text["nats"]), BLOCK)]  # fmt: skip

    return None if nats_of(cell) is None else _paired(blocks(cell), blocks(other))


def facts_gap(cell: Cell, other: Cell) -> tuple[float, float]:
    """Compute by how much a larger share of the facts a cell found, and its standard error."""
    common = min(len(cell["texts"]), len(other["texts"]))

    def hits(of: Cell) -> list[float]:
        return [float(hit) for text in of["texts"][:common] for hit in text["hits"]]

    return _paired(hits(cell), hits(other))


def window_for(cell: Cell, cells: list[Cell]) -> Cell | None:
    """Find the window of the cell's budget, or the one whose bytes are nearest."""
    windows = [c for c in cells if c["name"] == WINDOW and c["texts"]]
    if cell["name"] == WINDOW or not windows or not cell["texts"]:
        return None
    if cell["budget"] is not None:
        return next((w for w in windows if w["budget"] == cell["budget"]), None)
    return min(windows, key=lambda w: abs(math.log(bytes_of(w) / bytes_of(cell))))


def _row(cell: Cell, cells: list[Cell], link: str) -> list[str]:
    name = "window + sinks" if cell["name"] == WINDOW else cell["name"]
    label = name if name.startswith("base") else link.format(cell["name"], name)
    if cell["name"] == WHOLE and cell["window"] < max(t["tokens"] for t in cell["texts"]):
        label += f", as far as its context goes: {cell['window']:,} tokens"
    window, nats, (hits, count) = window_for(cell, cells), nats_of(cell), found_of(cell)
    gaps = ["", ""]
    if window is not None:
        gap = nats_gap(cell, window)
        gaps = ["-" if gap is None else f"{gap[0]:+.3f} ± {gap[1]:.3f}",
                "{:+.2f} ± {:.2f}".format(*facts_gap(cell, window))]  # fmt: skip
    tokens = sum(text["tokens"] for text in cell["texts"])
    seconds = sum(text["reading_seconds"] for text in cell["texts"]) / tokens * 1000
    decoding = statistics.fmean(text["decoding_seconds"] for text in cell["texts"])
    return [
        label, f"{bytes_of(cell) / 1e6:.1f}", "-" if nats is None else f"{nats:.3f}", gaps[0],
        f"{hits}/{count}", gaps[1], "-" if nats is None else f"{seconds:.1f}",
        f"{decoding * 1000:.0f}",
    ]  # fmt: skip


COLUMNS = ["", "MB", "nats a token", "minus window", "facts", "minus window",
           "reading, s per 1k tokens", "decoding, ms a token"]  # fmt: skip


def free_table(cells: list[Cell], link: str) -> str:
    """Write the table of what needs no training, by budget, the base first."""
    shown = [c for c in cells if c["kind"] == FREE and c["texts"]]
    order = {WHOLE: 0, NOTHING: 1, TRUNCATED: 2, WINDOW: 3}
    budgets = sorted({c["budget"] for c in shown if c["budget"] is not None})
    rows = [["budget", *COLUMNS]]
    for budget in (None, *budgets):
        part = [c for c in shown if c["budget"] == budget]
        part.sort(key=lambda c: (order.get(c["name"], 4), nats_of(c) or 0))
        title = "any" if budget is None else f"{budget:g} MB"
        rows += [[title, *_row(c, cells, link)] for c in part]
    return markdown(rows)


def trained_table(cells: list[Cell], link: str) -> str:
    """Write what is known here of memories that need training."""
    rows = [["", *COLUMNS]]
    about = {SHIPPED: "trained, ships with memwrap", UNTRAINED: "not trained"}
    for kind, note in about.items():
        part = [c for c in cells if c["kind"] == kind and c["texts"]]
        rows += [[note, *_row(c, cells, link)] for c in part]
    text = markdown(rows) if len(rows) > 1 else ""
    notes = [
        f"- {link.format(c['name'], c['name'])}: {c['note']}" for c in cells if c["kind"] == LISTED
    ]
    if notes:
        text += "\n\nListed without a figure:\n\n" + "\n".join(notes)
    return text.strip() or "None was measured."


def sentences(cells: list[Cell]) -> list[str]:
    """Say in three sentences what the numbers show."""
    shown = [c for c in cells if c["kind"] == FREE and c["texts"] and c["name"] != NOTHING]
    budgets = sorted({c["budget"] for c in shown if c["budget"] is not None})
    return [_of_nats(shown, budgets), _of_facts(cells, shown, budgets), _of_costs(shown)]


def _of_nats(shown: list[Cell], budgets: list[float]) -> str:
    parts, ahead = [], []
    for budget in budgets:
        rivals = [c for c in shown if c["budget"] == budget]
        best = min(rivals, key=lambda c: nats_of(c) or math.inf)
        window = next((c for c in rivals if c["name"] == WINDOW), None)
        beside = f", the window {nats_of(window):.3f}" if window is not None else ""
        parts.append(f"{best['name']} at {budget:g} MB ({nats_of(best):.3f}{beside})")
        for cell in rivals:
            gap = nats_gap(cell, window) if window not in (None, cell) else None
            if gap is not None and gap[0] < -2 * gap[1]:
                ahead.append(f"{cell['name']} at {budget:g} MB")
    whole = next((c for c in shown if c["name"] == WHOLE), None)
    text = f"The lowest nats a token: {', '.join(parts)}"
    text += f"; the base with all of the text {nats_of(whole):.3f}" if whole is not None else ""
    text += "; below the window of equal bytes by more than two standard errors: "
    return text + f"{', '.join(ahead) or 'none'}."


def _of_facts(cells: list[Cell], shown: list[Cell], budgets: list[float]) -> str:
    parts = []
    for budget in budgets:
        rivals = [c for c in shown if c["budget"] == budget]
        most = max(found_of(c)[0] for c in rivals)
        names = [c["name"] for c in rivals if found_of(c)[0] == most]
        window = next((c for c in rivals if c["name"] == WINDOW), None)
        beside = "" if window is None else f", the window {found_of(window)[0]}"
        by = f" with {' and '.join(names)}" if most and len(names) < 4 else " at most"
        parts.append(f"{most}{by} at {budget:g} MB{beside}")
    count = max(found_of(c)[1] for c in shown)
    others = [f"{c['name']} {found_of(c)[0]}" for c in cells
              if c["name"] in (WHOLE, NOTHING) and c["texts"]]  # fmt: skip
    keeping = [f"{c['name']} {found_of(c)[0]} with {bytes_of(c) / 1e6:.0f} MB" for c in shown
               if c["budget"] is None and c["name"] != WHOLE]  # fmt: skip
    return f"Of {count} facts were found {'; '.join([*parts, *others, *keeping])}."


def _of_costs(shown: list[Cell]) -> str:
    whole = next((c for c in shown if c["name"] == WHOLE), None)
    if whole is None:
        return "What the base itself costs was not measured."

    def seconds(cell: Cell) -> tuple[float, float]:
        tokens = sum(text["tokens"] for text in cell["texts"])
        reading = sum(text["reading_seconds"] for text in cell["texts"]) / tokens
        return reading, statistics.fmean(text["decoding_seconds"] for text in cell["texts"])

    base = seconds(whole)
    parts: dict[str, list[list[float]]] = {}
    for cell in shown:
        if cell["name"] in (WHOLE, TRUNCATED):
            continue
        ratios = [a / b for a, b in zip(seconds(cell), base, strict=True)]
        parts.setdefault(cell["name"], []).append(ratios)
    words = []
    for name, rows in parts.items():
        most = [max(column) for column in zip(*rows, strict=True)]
        words.append(f"{name} {most[0]:.1f} and {most[1]:.1f} times")
    return (
        f"Beside the processor's time that the base takes to read a token ({base[0] * 1000:.1f} "
        f"ms) and to decode one behind the text ({base[1] * 1000:.0f} ms), at most: "
        f"{', '.join(words)}."
    )


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points `(bytes, value)` that no point of as few bytes beats; less is better."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def plot_board(cells: list[Cell], path: str | Path) -> None:
    """Draw bytes of state against nats and against facts found, with the Pareto front."""
    shown = [c for c in cells if c["kind"] in (FREE, SHIPPED) and c["texts"]]
    shown = [c for c in shown if c["name"] != NOTHING]
    figure, (upper, lower) = _figure(2)
    names = list(dict.fromkeys(c["name"] for c in shown))
    values = [v for c in shown if (v := nats_of(c)) is not None]
    top = min(values) + ABOVE
    for panel, value, sign in (
        (upper, lambda c: min(nats_of(c) or math.inf, top), 1),
        (lower, lambda c: found_of(c)[0] / found_of(c)[1], -1),
    ):
        for index, name in enumerate(names):
            part = sorted((bytes_of(c) / 1e6, value(c)) for c in shown if c["name"] == name)
            beyond = panel is upper and any(
                (nats_of(c) or 0) > top for c in shown if c["name"] == name
            )
            label = "window + sinks" if name == WINDOW else name
            panel.plot(
                [x for x, _ in part], [y for _, y in part], color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)], markersize=6,
                linewidth=1,
                linestyle="-" if index < len(COLOURS) else "--",
                label=label + (" (at the edge: above it)" if beyond else ""),
            )  # fmt: skip
        best = front([(bytes_of(c) / 1e6, sign * value(c)) for c in shown])
        panel.step([x for x, _ in best], [sign * y for _, y in best], where="post", color="black",
                   linewidth=3, alpha=0.25, label="Pareto front")  # fmt: skip
        panel.set_xscale("log", base=2)  # a tick for every doubling: labels that do not meet
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("MB of state")
        panel.grid(alpha=0.3)
    upper.set_ylabel("nats a token (low is good)")
    lower.set_ylabel("facts found (high is good)")
    upper.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    lower.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def _missing(head: dict[str, Any], cells: list[Cell]) -> str:
    """Name what a run that was stopped did not come to."""
    count = max(len(cell["texts"]) for cell in cells)
    measured = {key_of(cell): len(cell["texts"]) for cell in cells if cell["kind"] != LISTED}
    planned = {key_of(cell) for part in head["cells"].values() for cell in part
               if cell["kind"] != LISTED}  # fmt: skip
    text = ""
    unknown = {*head.get("names", ())} - head["cells"].keys()
    missing = sorted(unknown | (planned - measured.keys()))
    if missing:
        text += f" Not measured yet: {', '.join(missing)}."
    fewer = sorted(key for key, texts in measured.items() if texts < count)
    if fewer:
        text += f" Measured on fewer than {count} texts so far: {', '.join(fewer)}."
    return text


def board_page(folder: str | Path, command: str, picture: str, link: str = "{1}") -> str:
    """Write a leaderboard in Markdown.

    Args:
        folder: of `Board`.
        command: that made it.
        picture: the name of the picture's file.
        link: how the name `{0}` of a memory stands in the tables, with the label `{1}`.
    """
    cells, head = read_cells(folder), read_json(Path(folder) / HEAD)
    values, any_cell = head["values"], max(cells, key=lambda c: len(c["texts"]))
    tokens = [text["tokens"] for text in any_cell["texts"]]
    source = values["documents"] or "Python's language reference"
    blocks = sum(-(-(count - 1) // BLOCK) for count in tokens)
    about = (
        f"`{head['model']}` in float32, trained no further, reads {_texts(tokens)} "
        f"({source}), in segments of "
        f"{values['segment_size']}. Nats are the mean of all tokens, each given what was kept of "
        f"those before it. {values['facts']} invented facts stand in each text, at all depths, and "
        "are asked for in a turn behind it; one is found if every token of its answer is the "
        "likeliest. MB is the most of a state at a segment's end; the segment that is being read "
        "comes on top, alike for all. The sizes of a memory are scaled until its state fills the "
        "budget; what keeps the text whatever its sizes, and what is fixed, appears once. "
        "*Minus window* is the paired difference to the window with sinks of the same budget (or "
        f"of the nearest bytes), with its standard error over blocks of {BLOCK} tokens"
        f" (n {blocks}), over facts for facts. *Truncated* reads "
        "stretches as long as the budget, each without what came before. Seconds are the "
        "processor's, on a machine that had other work."
    )
    return PAGE.format(
        picture=picture, about=about, command=command, seed=values["seed"],
        machine=_machine(any_cell["machine"]), missing=_missing(head, cells),
        sentences="\n".join(f"- {line}" for line in sentences(cells)),
        free=free_table(cells, link), trained=trained_table(cells, link),
    )  # fmt: skip


def _texts(tokens: list[int]) -> str:
    if len(tokens) == 1:
        return f"one text of {tokens[0]:,} tokens"
    return f"{len(tokens)} texts of {min(tokens):,} to {max(tokens):,} tokens"


def _machine(about: dict[str, Any]) -> str:
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} of them used, torch "
        f"{about['torch']}, transformers {about['transformers']}"
    )


def write_board(folder: str | Path, command: str) -> list[Path]:
    """Write `leaderboard.md` and `leaderboard.png` into a board's folder."""
    folder = Path(folder)
    paths = [folder / "leaderboard.md", folder / "leaderboard.png"]
    text = board_page(folder, command, "leaderboard.png").replace("(figures/", "(")
    write_text(paths[0], text)
    plot_board(read_cells(folder), paths[1])
    return paths


__all__ = ["board_page", "front", "plot_board", "sentences", "write_board"]
