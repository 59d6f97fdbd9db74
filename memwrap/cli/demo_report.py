"""What a run of the demo shows: its pictures, three sentences made from its numbers, and the part
of README.md that is written from them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from memwrap.cli.demo_trained import said_of
from memwrap.evaluation.plots import plot_depths
from memwrap.io.atomic_files import write_text
from memwrap.io.plotting import COLOURS, MARKERS, _figure, _save

RESULTS = "results.json"
MARKS = ("<!-- demo:begin -->", "<!-- demo:end -->")
TRUNCATED, WHOLE = "base, truncated", "base, whole"
CURVES = ("memory", TRUNCATED, WHOLE, "window + sinks")


def draw_facts(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Draw which facts were found; returns the cells in the picture's order."""
    cells = sorted(results["facts"], key=lambda c: (CURVES.index(c["curve"]), c["length"]))
    plot_depths([SimpleNamespace(**cell) for cell in cells], path)
    return cells


def draw_nats(results: dict[str, Any], path: Path) -> None:
    """Draw nats per token by position."""
    step, costs = results["nats"]["step"], results["nats"]["memories"]
    figure, (panel,) = _figure(1)
    for index, (name, of) in enumerate(costs.items()):
        places = [step * (i + 0.5) for i in range(len(of["nats"]))]
        panel.plot(places, of["nats"], label=f"{name}, {of['bytes'] / 1e6:.0f} MB",
                   color=COLOURS[index], marker=MARKERS[index], markersize=4)  # fmt: skip
    panel.set_xlabel("token")
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    _save(figure, path)


def _key(cell: dict[str, Any]) -> tuple[str, int]:
    return cell["curve"], cell["length"]


def conclusions(results: dict[str, Any]) -> list[str]:
    """Say in three sentences what the numbers of a run show."""
    document, cells, told = results["document"], results["facts"], results["settings"]
    counts = {_key(cell): int(sum(cell["depth"])) for cell in cells}
    lengths = sorted({cell["length"] for cell in cells})
    total = len(cells[0]["depth"])

    def row(curve: str) -> str:
        known = [(counts[curve, n], n) for n in lengths if (curve, n) in counts]
        return ", ".join(f"{count} at {n:,}" for count, n in known)

    longest = lengths[-1]
    first = (
        f"A document of {document['tokens']:,} tokens was read once, in {document['seconds']:.0f} "
        f"s, into a file of {document['bytes'] / 1e6:,.0f} MB; of {total} facts in it the memory "
        f"found {counts['memory', longest]}, the base with all that its context holds "
        f"{counts[WHOLE, longest]}, with the last {told['truncated']:,} tokens "
        f"{counts[TRUNCATED, longest]}."
    )
    second = f"By length of the text the memory found {row('memory')} tokens, the base with the "
    second += f"whole text or its first {told['context']:,} tokens {row(WHOLE)}"
    if row("window + sinks"):
        second += f", a window of {told['looks']:,} with sinks {row('window + sinks')}"
    if ("memory", lengths[0]) in counts:
        lost = counts["memory", lengths[0]] - counts["memory", longest]
        second += f"; from the shortest to the longest the memory lost {max(lost, 0)}"
    if "nats" not in results:
        third = "The run was cut short: nats per token were not compared."
        return [first, second + ".", third]
    return [first, second + ".", _of_nats(results["nats"]["memories"], told["entries"])]


def _of_nats(memories: dict[str, Any], entries: int) -> str:
    """Say which memory predicts best, with the bytes that it takes for it."""
    best = min(memories, key=lambda name: memories[name]["mean"])
    window = memories["window + sinks"]
    if best == "window + sinks":
        return (
            f"With {entries} entries a layer the plain window with sinks predicts the next word "
            "best: take a memory to find what is far back, not to lower the loss."
        )
    sizes = [f"{values['bytes'] / 1e6:.0f} MB" for values in (memories[best], window)]
    return (
        f"With {entries} entries a layer {best} ({sizes[0]}) predicts the next word of this one "
        f"text best, by {window['mean'] - memories[best]['mean']:.3f} nats a token over the window "
        f"with sinks ({sizes[1]})."
    )


def seconds_of(results: dict[str, Any]) -> str:
    """Say how long a run took, and each of its parts."""
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["parts"].items())
    return (
        f"{results['seconds']:.0f} s in all on {results['threads']} cores, two parts side by side: "
        f"{parts}; {results['processor_seconds']:.0f} s of processors."
    )


def publish(folder: Path, readme: Path) -> None:
    """Put what a run found between the marks of README.md, and its pictures into docs/figures.

    Args:
        folder: of the run.
        readme: the page.
    """
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    figures = readme.parent / "docs" / "figures"
    draw_facts(results, figures / "demo_facts.png")
    if "nats" in results:
        draw_nats(results, figures / "demo_nats.png")
    depths = len(results["facts"][0]["depth"])
    lengths = sorted({cell["length"] for cell in results["facts"]})
    counts = {_key(cell): f"{sum(cell['depth']):.0f}" for cell in results["facts"]}
    rows = [
        [f"found of {depths}", *(f"{n:,} tokens" for n in lengths)],
        ["---"] * (1 + len(lengths)),
    ]
    rows += [[curve, *(counts.get((curve, n), "-") for n in lengths)] for curve in CURVES]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = "\n".join(f"- {sentence}" for sentence in conclusions(results))
    parts = [table, "![Facts found by depth and length](docs/figures/demo_facts.png)"]
    if "nats" in results:
        parts.append("![Nats per token by position](docs/figures/demo_nats.png)")
    if "trained" in results:
        curves = results["trained"]["curves"]
        heads = ["a trained memory: facts known", *(f"{n} tokens" for n in curves["memory"])]
        lines = [heads, ["---"] * len(heads)]
        lines += [[n, *(f"{share:.2f}" for share in c.values())] for n, c in curves.items()]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
    if "training" in results:
        parts.append(said_of(results["training"]))
    parts.append(seconds_of(results))
    begin, end = MARKS
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    whole = "\n\n".join([f"{before}{begin}", *parts, text, f"{end}{rest.partition(end)[2]}"])
    write_text(readme, whole)


__all__ = ["conclusions", "draw_facts", "draw_nats", "publish"]

if __name__ == "__main__":  # python -m memwrap.cli.demo_report FOLDER README.md
    import sys

    publish(Path(sys.argv[1]), Path(sys.argv[2]))
