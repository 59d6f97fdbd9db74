"""Results as one HTML file that needs nothing else, and several results side by side."""

from __future__ import annotations

import base64
import html
import tempfile
from pathlib import Path
from typing import Any

from memwrap.evaluation.controls import MEMORY
from memwrap.evaluation.conversations import ConversationsResult
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.plots import (
    plot_conversations,
    plot_costs,
    plot_depths,
    plot_lengths,
    plot_perplexity,
    plot_recall,
)
from memwrap.evaluation.recall import RecallResult
from memwrap.evaluation.suite import SuiteResult
from memwrap.io.atomic_files import write_text
from memwrap.io.reading import read_json

Result = SuiteResult | PerplexityResult | RecallResult | ConversationsResult
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
img { max-width: 100% }
"""


def load_result(path: str | Path) -> list[tuple[str, Result]]:
    """Load the results of a JSON file that `memwrap eval` wrote, with their names.

    Raises:
        ValueError: for a file that is none, naming it.
    """
    path = Path(path)
    try:
        values = read_json(path)
        return [(name, _result(part)) for name, part in _parts(values)]
    except (OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result of `memwrap eval`: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parts(values: Any) -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        raise ValueError(f"This is a {type(values).__name__}, no result of `memwrap eval`.")
    return [("", values)] if "format" in values else list(values.items())


def _result(values: dict[str, Any]) -> Result:
    kinds: tuple[Any, ...] = (SuiteResult, ConversationsResult, RecallResult)
    kind = {k.format: k for k in kinds}.get(values.get("format", ""), PerplexityResult)
    return kind.from_dict(values)


def rows(results: dict[str, list[tuple[str, Result]]]) -> list[list[str]]:
    """Make a table of several results: a line for each thing measured, a column for each result.

    Args:
        results: by the name that heads the column; what `load_result` gave.

    Returns:
        The lines, the head first. A cell is "-" where a result has nothing of the kind.
    """
    columns = {name: _measured(parts) for name, parts in results.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    lines = [[quantity, curve, *[c.get((quantity, curve), "-") for c in columns.values()]]
             for quantity, curve in keys]  # fmt: skip
    return [["measured", "read with", *columns], *lines]


def _measured(parts: list[tuple[str, Result]]) -> dict[tuple[str, str], str]:
    figures: dict[tuple[str, str], str] = {}
    for name, result in parts:
        if isinstance(result, SuiteResult):
            for cell in result.cells:
                key = (f"{cell.task}, {cell.length:,} tokens", cell.curve)
                figures[key] = f"{cell.accuracy:.2f} ({cell.low:.2f}-{cell.high:.2f})"
        elif isinstance(result, ConversationsResult):
            for (measure, reader), cells in result.figures().items():
                figures |= {(f"{measure}, {n} turns", reader): text for n, text in cells.items()}
        elif isinstance(result, PerplexityResult):
            for curve_name, curve in result.curves.items():
                figures["nats per token", curve_name] = f"{curve.overall:.3f}"
        else:
            for curve_name, values in result.accuracy.items():
                for distance, value in zip(result.distances, values, strict=True):
                    key = (f"{name or 'recall'}, distance {distance}", curve_name)
                    figures[key] = f"{value:.2f} ± {result.error(value):.2f}"
    return figures


def markdown(lines: list[list[str]]) -> str:
    """Write lines as a Markdown table; the first is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(results: dict[str, Result], path: str | Path, title: str = "memwrap") -> None:
    """Write one HTML file that needs nothing else: tables, curves, time and memory.

    Args:
        results: by name, as `load_result` gives them.
        path: of the file.
        title: its heading.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    with tempfile.TemporaryDirectory() as folder:
        for name, result in results.items():
            subfolder = Path(folder) / name
            subfolder.mkdir()
            if isinstance(result, SuiteResult):
                parts += _suite(result, subfolder)
            elif isinstance(result, ConversationsResult):
                parts += _conversations(result, subfolder)
            else:
                parts += [f"<h2>{html.escape(name)}</h2>", *_curves(name, result, subfolder)]
    _write(path, parts)


def _suite(result: SuiteResult, folder: Path) -> list[str]:
    """Write accuracy by length, depth by length, time and memory by length."""
    parts = [
        f"<p>Segments of {result.segment_size} tokens, window of the base {result.window}, seed "
        f"{result.seed}. Intervals: 95 %, by samples.</p>",
        _from_markdown(result.table()),
    ]
    for index, name in enumerate(result.tasks()):
        cells = [cell for cell in result.cells if cell.task == name]
        parts.append(f"<h2>{html.escape(name)}</h2>")
        for kind, plot in (("right", plot_lengths), ("depths", plot_depths), ("costs", plot_costs)):
            picture = folder / f"{index}-{kind}.png"
            plot(cells, picture)
            parts.append(_image(picture, f"{name}: {kind}"))
    head = ["task", "read with", "tokens", "seconds a text", "peak memory, MB"]
    lines = [head, []]
    for cell in result.cells:
        own_reading = " (reading included)" if cell.curve == MEMORY else ""
        seconds = f"{cell.seconds / cell.samples:.3f}{own_reading}"
        length, peak = f"{cell.length:,}", _megabytes(cell.peak_bytes)
        lines.append([cell.task, cell.curve, length, seconds, peak])
    return [*parts, "<h2>Time and memory</h2>", _table(lines)]


def _conversations(result: ConversationsResult, folder: Path) -> list[str]:
    """Write both tables, the plot, and what the memory and the other readers took."""
    plot_conversations(result, folder / "plot.png")
    lines = [["read with", "", "seconds"], []]
    lines += [[reader, "", f"{value:.1f}"] for reader, value in result.seconds.items()]
    sizes = ", ".join(
        f"{n} turns: {value:,.0f} bytes, as {result.tokens[n]:,.0f} tokens of the cache"
        for n, value in result.state_bytes.items()
    )
    return [
        f"<p>{result.dialogues} conversations of each length, sessions of {result.session} turns, "
        f"seed {result.seed}. Intervals: 95 %, by questions. The memory's state: {sizes}.</p>",
        *[_from_markdown(text) for text in result.table().split("\n\n")],
        _image(folder / "plot.png", "by number of turns"),
        _table(lines),
    ]


def _curves(name: str, result: PerplexityResult | RecallResult, folder: Path) -> list[str]:
    """Write a table, a plot, and what each curve took."""
    picture = folder / "plot.png"
    costs: dict[str, tuple[float, int | None]]
    if isinstance(result, RecallResult):
        plot_recall({name: result}, picture)
        costs = {n: (t, result.peak_bytes.get(n)) for n, t in result.seconds.items()}
    else:
        plot_perplexity(result, picture)
        costs = {n: (c.seconds, c.peak_bytes) for n, c in result.curves.items()}
    lines = [["read with", "", "seconds", "peak memory, MB"], []]
    lines += [[n, "", f"{t:.2f}", _megabytes(peak)] for n, (t, peak) in costs.items()]
    return [_from_markdown(result.table()), _image(picture, name), _table(lines)]


def _megabytes(peak: int | None) -> str:
    return "-" if peak is None else f"{peak / 1e6:.0f}"


def _from_markdown(text: str) -> str:
    return _table([line.strip("| ").split(" | ") for line in text.splitlines()])


def write_comparison(lines: list[list[str]], path: str | Path) -> None:
    """Write the table of `rows` as an HTML file."""
    _write(path, ["<h1>Results side by side</h1>", _table([lines[0], [], *lines[1:]])])


def _table(lines: list[list[str]]) -> str:
    """Write lines as an HTML table; the second, Markdown's rule, is left out."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in lines[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in lines[2:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def _write(path: str | Path, parts: list[str]) -> None:
    head = f'<!doctype html><meta charset="utf-8"><title>memwrap</title><style>{STYLE}</style>'
    write_text(path, "\n".join([head, *parts]) + "\n")
