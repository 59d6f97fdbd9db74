"""Results of tasks as one HTML file that needs nothing else, and several results side by side."""

from __future__ import annotations

import base64
import html
import json
import tempfile
from pathlib import Path
from typing import Any

from memwrap.evaluation.associative import RecallResult
from memwrap.evaluation.controls import MEMORY
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.plots import plot_depths, plot_lengths
from memwrap.evaluation.suite import SuiteResult
from memwrap.files import write_text

Result = SuiteResult | PerplexityResult | RecallResult
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, td:nth-child(2), th:first-child, th:nth-child(2) { text-align: left }
img { max-width: 100% }
"""


def load_result(path: str | Path) -> list[tuple[str, Result]]:
    """The results of a JSON file that `memwrap eval` wrote, with their names.

    Raises:
        ValueError: for a file that is none, naming it.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [(name, _result(part)) for name, part in _parts(values)]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no result of `memwrap eval`: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parts(values: Any) -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        raise ValueError(f"This is a {type(values).__name__}, no result of `memwrap eval`.")
    return [("", values)] if "format" in values else list(values.items())


def _result(values: dict[str, Any]) -> Result:
    kind = values.get("format")
    if kind == "memwrap-suite":
        return SuiteResult.from_dict(values)
    if kind == "memwrap-recall" and values.get("version") == 1:
        own = {k: v for k, v in values.items() if k not in ("format", "version")}
        return RecallResult(**own)
    return PerplexityResult.from_dict(values)


def rows(results: dict[str, list[tuple[str, Result]]]) -> list[list[str]]:
    """A table of several results: a line for each thing measured, a column for each result.

    Args:
        results: by the name that heads the column; what `load_result` gave.

    Returns:
        The lines, the head first. A cell is "-" where a result has nothing of the kind.
    """
    columns = {name: _measured(parts) for name, parts in results.items()}
    keys = list(dict.fromkeys(key for found in columns.values() for key in found))
    lines = [[what, curve, *[c.get((what, curve), "-") for c in columns.values()]]
             for what, curve in keys]  # fmt: skip
    return [["measured", "read with", *columns], *lines]


def _measured(parts: list[tuple[str, Result]]) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for name, result in parts:
        if isinstance(result, SuiteResult):
            for cell in result.cells:
                key = (f"{cell.task}, {cell.length:,} tokens", cell.curve)
                found[key] = f"{cell.accuracy:.2f} ({cell.low:.2f}-{cell.high:.2f})"
        elif isinstance(result, PerplexityResult):
            for curve_name, curve in result.curves.items():
                found["nats per token", curve_name] = f"{curve.overall:.3f}"
        else:
            for curve_name, values in result.accuracy.items():
                for distance, value in zip(result.distances, values, strict=True):
                    key = (f"{name or 'recall'}, distance {distance}", curve_name)
                    found[key] = f"{value:.2f} ± {result.error(value):.2f}"
    return found


def markdown(lines: list[list[str]]) -> str:
    """Lines as a Markdown table; the first is the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(result: SuiteResult, path: str | Path) -> None:
    """One HTML file: the table, accuracy by length, depth by length, time and memory."""
    parts = [
        f"<h1>{html.escape(result.model or 'Tasks')}</h1>",
        f"<p>Segments of {result.segment_size} tokens, window of the base {result.window}, seed "
        f"{result.seed}. Intervals: 95 %, by samples.</p>",
        _table([line.strip("| ").split(" | ") for line in result.table().splitlines()]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(result.tasks()):
            own = [cell for cell in result.cells if cell.task == name]
            parts.append(f"<h2>{html.escape(name)}</h2>")
            pictures = [Path(folder) / f"{index}-{kind}.png" for kind in ("lengths", "depths")]
            plot_lengths(own, pictures[0])
            plot_depths(own, pictures[1])
            parts += [_image(picture, name) for picture in pictures]
        parts.append("<h2>Time and memory</h2>")
        parts.append(_table(_costs(result)))
    _write(path, parts)


def write_comparison(lines: list[list[str]], path: str | Path) -> None:
    """The table of `rows` as an HTML file."""
    _write(path, ["<h1>Results side by side</h1>", _table([lines[0], [], *lines[1:]])])


def _costs(result: SuiteResult) -> list[list[str]]:
    head = ["task", "read with", "tokens", "seconds a text", "peak memory, MB"]
    lines = [head, []]
    for cell in result.cells:
        peak = "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 1e6:.0f}"
        own = " (reading included)" if cell.curve == MEMORY else ""
        seconds = f"{cell.seconds / cell.samples:.3f}{own}"
        lines.append([cell.task, cell.curve, f"{cell.length:,}", seconds, peak])
    return lines


def _table(lines: list[list[str]]) -> str:
    """The second line, Markdown's rule, is left out."""
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
