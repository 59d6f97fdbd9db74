"""Tables, a figure and a page of a comparison of memories (`comparison.compare`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memwrap.comparison.runs import BASE, PARTS, PROMPT
from memwrap.evaluation.controls import FULL, MEMORY, OFF, SHUFFLED, TRUNCATED, WINDOW
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.recall import RecallResult
from memwrap.evaluation.report import markdown
from memwrap.io.atomic_files import write_text

Results = dict[str, dict[str, Any]]
TASKS = ("remember", "rewrite")
PAGE = """# All memories, one budget

{about}

Made by `{command}` with seed {seed} on {machine}.

## In short

{advice}

## Perplexity

Nats per token on {documents} held-out documents of {tokens:,} tokens, segments of {segment}. "Off"
reads every segment with an empty memory, "shuffled" with the other document's memory; the
difference to "memory" is what the memory's content is worth (positive: it helps), with the
standard error across documents.

{perplexity}

The base, which is trained no further, on the same documents:

{base}

## Associative recall

Share of right answers by how many pairs (of {pair} tokens, a segment each) stand between a pair and
its question. Training goes to {pairs} pairs; the last columns are {multiples} of that. In
*remember* all keys differ (there are {keys}), in *rewrite* a key comes again and its last value
counts. Chance is {chance:.2f}; the standard error is at most {error:.2f}. Memory off and shuffled
are on the pages of the memories.

{recall}

## Costs

Reading and decoding are measured for all in turns in one run on one thread, untrained: seconds for
1,000 tokens, the base in windows as long as a segment, and tokens a second after a prompt of
{prompt} tokens, the base with its cache of keys and values. The state is that of one row after
{tokens:,} tokens. Training times are of one run each, on a machine that may have had other work.

{costs}
"""


def load_curves(results: Results) -> dict[str, PerplexityResult]:
    """Load the perplexities by memory."""
    return {
        name: PerplexityResult.from_dict(values["perplexity"])
        for name, values in results.items()
        if name != BASE
    }


def tokens_of(result: PerplexityResult) -> int:
    """Count the tokens of a document: those that were predicted, and the first."""
    return sum(result.curves[MEMORY].tokens) // result.documents + 1


def perplexity_rows(curves: dict[str, PerplexityResult], link: str = "{}") -> list[list[str]]:
    """Make a line a memory: nats with the memory and its controls, and what they differ by."""
    rows = [["memory", "memory", "off", "shuffled", "off - memory", "shuffled - memory"]]
    for name, result in curves.items():
        curve_of = result.curves
        cells = [f"{curve_of[c].overall:.3f}" for c in (MEMORY, OFF, SHUFFLED)]
        gains = [f"{curve_of[c].gain:+.4f} ± {curve_of[c].gain_error:.4f}" for c in (OFF, SHUFFLED)]
        rows.append([link.format(name), *cells, *gains])
    return rows


def base_rows(curves: dict[str, PerplexityResult]) -> list[list[str]]:
    """Make the backbone's own curves."""
    any_result = next(iter(curves.values()))
    rows = [["base", "nats per token"]]
    for name in (TRUNCATED, WINDOW, FULL):
        curve = any_result.curves[name]
        note = f" (its first {sum(curve.tokens):,} tokens)" if name == FULL else ""
        rows.append([name + note, f"{curve.overall:.3f}"])
    return rows


def _accuracy(values: dict[str, Any], curve: str) -> dict[int, float]:
    return dict(zip(values["distances"], values["accuracy"][curve], strict=True))


def distances(results: Results) -> list[int]:
    """List all distances that were measured."""
    lists = (v["distances"] for r in results.values() for v in r["recall"].values())
    return sorted({d for part in lists for d in part})


def recall_rows(results: Results) -> list[list[str]]:
    """Make a line a task and memory: accuracy by distance."""
    columns = distances(results)
    rows = [["task", "memory", *map(str, columns)]]
    for task in TASKS:
        for name, values in results.items():
            curve = TRUNCATED if name == BASE else MEMORY
            accuracy = _accuracy(values["recall"][task], curve)
            label = "base, untrained, sees all" if name == BASE else name
            cells = [f"{accuracy[d]:.2f}" if d in accuracy else "-" for d in columns]
            if any(cell != "-" for cell in cells):
                rows.append([task, label, *cells])
    return rows


def cost_rows(results: Results) -> list[list[str]]:
    """Make a line a memory: parameters, state, times."""
    base = results[BASE].get("speed")
    rows = [
        ["memory", "parameters added", "bytes of state", "reading, s per 1k tokens", "over base",
         "decoding, tokens/s", "over base", "training, s (documents + recall)"],
    ]  # fmt: skip
    for name, values in results.items():
        speed = values.get("speed")
        times = ["-"] * 4
        if speed and base:
            times = [
                f"{speed['read'] * 1000:.2f}", f"{speed['read'] / base['read']:.2f}",
                f"{1 / speed['decode']:.0f}", f"{base['decode'] / speed['decode']:.2f}",
            ]  # fmt: skip
        if name == BASE:
            rows.append([name, "0", "-", *times, "-"])
            continue
        costs, seconds = values["costs"], values["training_seconds"]
        rows.append(
            [
                name,
                f"{costs['added_parameters']:,}",
                f"{costs['state_bytes']:,}",
                *times,
                f"{seconds['documents']:.0f} + {seconds['recall']:.0f}",
            ]
        )
    return rows


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def advice(results: Results) -> str:
    """Write what the figures say to somebody who has to choose, in sentences made from them."""
    curves = load_curves(results)
    any_result = next(iter(curves.values()))
    baseline = any_result.curves[WINDOW].overall

    def is_worse(name: str, *controls: str) -> bool:
        """Tell whether it is worse than every control, by more than two standard errors."""
        control_curves = [curves[name].curves[c] for c in controls]
        return all(c.gain > 2 * c.gain_error for c in control_curves)

    helped = [n for n in curves if is_worse(n, OFF, SHUFFLED)]
    order = sorted(curves, key=lambda n: curves[n].curves[MEMORY].overall)
    better = [n for n in order if is_worse(n, WINDOW)]
    lines = [
        f"- **The next token of a long document** (perplexity): lowest with "
        f"{_names(f'{n} ({curves[n].curves[MEMORY].overall:.3f})' for n in order[:3])}; the "
        f"untrained base with window and sinks has {baseline:.3f} and is beaten, by "
        f"more than two standard errors, by {_names(better)}.",
        f"- **What was read helped**, by more than two standard errors against both controls: "
        f"{_names(helped)}.",
    ]
    columns = [d for d in distances(results) if d > 1]
    for distance in columns[-4:]:
        good, unknown = [], []
        for name in curves:
            values = results[name]["recall"]["rewrite"]
            accuracy = _accuracy(values, MEMORY).get(distance)
            if accuracy is None:
                unknown.append(name)
            elif accuracy >= 0.5:
                good.append((accuracy, name))
        named = _names(f"{n} ({a:.2f})" for a, n in sorted(good, reverse=True))
        lines.append(
            f"- **A fact {distance} segments back**, right at least every other time: {named}"
            + (f" (not measured: {_names(unknown)})." if unknown else ".")
        )
    return "\n".join(lines)


def recall_table(values: dict[str, Any]) -> str:
    """Write one task's accuracy by distance, with its controls."""
    fields = {k: v for k, v in values.items() if k not in ("format", "version")}
    return RecallResult(**fields).table()


def _machine(about: dict[str, Any]) -> str:
    gpu = "no GPU" if about["gpu"] == "none" else about["gpu"]
    return (
        f"{about['cpu']}, {about['cores']} cores, {gpu}, torch {about['torch']}, transformers "
        f"{about['transformers']}"
    )


def page(results: Results, command: str, link: str = "{}") -> str:
    """Write the whole comparison in Markdown.

    Args:
        results: of `comparison.read_results`.
        command: that made them.
        link: how a memory's name stands in the first table, as "[{0}](methods/{0}.md)".
    """
    curves = load_curves(results)
    first = results[next(iter(curves))]
    some = curves[first["memory"]]
    recall = first["recall"]["rewrite"]
    pairs = recall["task"]["num_pairs"]
    far = [d // pairs for d in distances(results) if d > pairs and d % pairs == 0]
    without = [n for n, values in results.items() if n != BASE and not values["lora"]]
    seen = [f"{first['budget'][p]:,} tokens ({first['steps'][p]} steps)" for p in PARTS]
    about = (
        f"Every memory on `{first['model']}`, trained with the same data, seed and LoRA: {seen[0]} "
        f"of documents and {seen[1]} of recall, one run each: differences of some thousandths of "
        "a nat, and of some hundredths of accuracy, are noise. After minutes of training it says "
        "what learns quickly, not what a method can do in the end."
        + (f" Without LoRA, as their method has it: {_names(without)}." if without else "")
        + "".join(f" {n} {v['note']}." for n, v in results.items() if v.get("note"))
        + "".join(f" {n} {v['source']}." for n, v in results.items() if v.get("source"))
    )
    return PAGE.format(
        about=about, command=command, seed=first["seed"], machine=_machine(first["machine"]),
        advice=advice(results),
        documents=some.documents, tokens=tokens_of(some), segment=some.segment_size,
        perplexity=markdown(perplexity_rows(curves, link)), base=markdown(base_rows(curves)),
        pair=recall["task"]["key_size"] + recall["task"]["value_size"] + 2, pairs=pairs,
        multiples=", ".join(f"{n}x" for n in far), keys=16 ** recall["task"]["key_size"],
        chance=recall["chance"], error=0.5 / recall["samples"] ** 0.5,
        recall=markdown(recall_rows(results)), costs=markdown(cost_rows(results)),
        prompt=PROMPT,
    )  # fmt: skip


def write_page(results: Results, folder: str | Path, command: str) -> list[Path]:
    """Write `comparison.md` and `comparison.png` into `folder`."""
    from memwrap.comparison.plots import plot_comparison

    paths = [Path(folder) / "comparison.md", Path(folder) / "comparison.png"]
    write_text(paths[0], page(results, command))
    plot_comparison(results, paths[1])
    return paths


__all__ = ["advice", "load_curves", "page", "recall_table", "tokens_of", "write_page"]
