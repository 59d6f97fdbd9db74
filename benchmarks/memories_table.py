"""Put the results of `memories.py` into docs/comparison.md and the memories' own pages.

python benchmarks/memories_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memwrap.evaluation.associative import RecallResult
from memwrap.evaluation.controls import FULL, MEMORY, OFF, SHUFFLED, TRUNCATED, WINDOW
from memwrap.evaluation.perplexity import PerplexityResult

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MARKS = ("<!-- evidence:begin -->", "<!-- evidence:end -->")
DISTANCES = (1, 2, 4, 8)

INTRODUCTION = """# All memories, one budget

Memories on the shipped tiny LM (5.8M parameters), trained with the same data, steps, seed and
LoRA ({steps} steps of 4 x 1,024 tokens; memoryprompt trains no LoRA), one run each: differences of
some thousandths of a nat, and of some hundredths of accuracy, are noise. This is a small model
after minutes of training; it says what learns quickly, not what a method can do in the end.

Made by `python benchmarks/memories.py` and `python benchmarks/memories_table.py` on
{cpu}, {cores} cores (two runs and other work beside each other), torch {torch}, no GPU.

## Perplexity

Nats per token on {documents} held-out documents of {tokens:,} tokens, segments of {segment}. "Off"
reads every segment with an empty memory, "shuffled" with the other document's memory; the
difference to "memory" is what the memory's content is worth (positive: it helps), with the standard
error across documents.

{perplexity}

The base, which is trained no further, on the same documents:

{base}

{reading}

## Associative recall

Share of right answers by how many pairs (of 4 tokens, a segment each) lie between a pair and its
question; up to 8 pairs in training ({recall_steps} steps). Chance is 0.06. Memory off and shuffled
are in the pages of the memories.

{recall}

## Costs

Reading is measured in turns in one run on one thread (`python benchmarks/memories.py --speed`), the
base in windows of the same length. How long training took is not shown: other work ran beside it.

{costs}
"""


def table(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tokens_of(result: PerplexityResult) -> int:
    """Tokens of a document: those that were predicted, and the first."""
    return sum(result.curves[MEMORY].tokens) // result.documents + 1


def load() -> dict[str, dict[str, Any]]:
    found = [json.loads(p.read_text()) for p in sorted((HERE / "results/memories").glob("*.json"))]
    return {result["memory"]: result for result in found}


def perplexity_rows(results: dict[str, PerplexityResult]) -> list[list[str]]:
    rows = [["memory", "memory", "off", "shuffled", "off - memory", "shuffled - memory"]]
    for name, result in results.items():
        curves = result.curves
        cells = [f"{curves[c].overall:.3f}" for c in (MEMORY, OFF, SHUFFLED)]
        gains = [f"{curves[c].gain:+.4f} ± {curves[c].gain_error:.4f}" for c in (OFF, SHUFFLED)]
        rows.append([f"[{name}](methods/{name}.md)", *cells, *gains])
    return rows


def conclusion(results: dict[str, PerplexityResult]) -> str:
    """What the numbers say, in a sentence or two."""
    helped = [
        name
        for name, result in results.items()
        if all(result.curves[c].gain > 2 * result.curves[c].gain_error for c in (OFF, SHUFFLED))
    ]
    baseline = results["window"].curves[WINDOW].overall
    better = [
        n for n, r in results.items() if r.curves[MEMORY].overall < baseline and n != "window"
    ]
    return (
        f"What was read helped by more than two standard errors against both controls: "
        f"{', '.join(helped) or 'none'}. Lower than the untrained base with window and sinks "
        f"({baseline:.3f}), which keeps 512 tokens as they are: {', '.join(better) or 'none'}"
        f"{'' if better else '; at this size and budget the window is the better choice'}."
    )


def base_rows(window: PerplexityResult) -> list[list[str]]:
    rows = [["base", "nats per token"]]
    for name in (TRUNCATED, WINDOW, FULL):
        note = f" (its first {sum(window.curves[name].tokens):,} tokens)" if name == FULL else ""
        rows.append([name + note, f"{window.curves[name].overall:.3f}"])
    return rows


def recall_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [["memory", "task", *[f"distance {d}" for d in DISTANCES]]]
    for name, result in results.items():
        for task, values in result["recall"].items():
            accuracy = dict(zip(values["distances"], values["accuracy"][MEMORY], strict=True))
            rows.append([name, task, *[f"{accuracy[d]:.2f}" for d in DISTANCES]])
    any_result = next(iter(results.values()))["recall"]
    for task, values in any_result.items():
        accuracy = dict(zip(values["distances"], values["accuracy"][TRUNCATED], strict=True))
        rows.append(["base, untrained", task, *[f"{accuracy[d]:.2f}" for d in DISTANCES]])
    return rows


def cost_rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    head = ["memory", "parameters added", "bytes of state a row", "reading, seconds per 1k tokens",
            "reading / bare base"]  # fmt: skip
    rows = [head]
    for name, result in results.items():
        costs = result["costs"]
        rows.append(
            [
                name,
                f"{costs['added_parameters']:,}",
                f"{costs['state_bytes']:,}",
                f"{costs['read_seconds_per_1k_tokens']:.2f}",
                f"{costs['reading_over_base']:.2f}" if "reading_over_base" in costs else "-",
            ]
        )
    return rows


def recall_table(values: dict[str, Any]) -> str:
    own = {k: v for k, v in values.items() if k not in ("format", "version")}
    return RecallResult(**own).table()


def page(name: str, result: dict[str, Any], base: PerplexityResult) -> str:
    """What stands in a memory's own page."""
    own = PerplexityResult.from_dict(result["perplexity"])
    for curve in (TRUNCATED, WINDOW, FULL):
        own.curves.setdefault(curve, base.curves[curve])
    lines = own.table().splitlines()
    # The last column compares with this memory's curve; the base's were read beside another.
    lines = [line.rsplit("|", 2)[0] + "|" if "base" in line else line for line in lines]
    lines = [line + " |" if "base" in line else line for line in lines]
    recall = "\n\n".join(
        f"{task}\n\n{recall_table(values)}" for task, values in result["recall"].items()
    )
    settings = ", ".join(f"`{k}={v}`" for k, v in result["settings"]["documents"].items())
    pairs = ", ".join(f"`{k}={v}`" for k, v in result["settings"]["recall"].items())
    steps = result["steps"]
    return (
        f"The shipped tiny LM, one run, seed 0 (`python benchmarks/memories.py --only {name}`; all "
        f"memories side by side: [comparison](../comparison.md)).\n\n"
        f"Nats per token by segment on {own.documents} held-out documents of {tokens_of(own):,} "
        f"tokens, after {steps['documents']} steps with "
        f"{settings}:\n\n" + "\n".join(lines) + "\n\n"
        f"Associative recall by distance, after {steps['recall']} steps with {pairs}:\n\n{recall}"
    )


def main() -> None:
    results = load()
    if "window" not in results:
        raise SystemExit("results/memories/window.json is missing: run memories.py first.")
    curves = {n: PerplexityResult.from_dict(r["perplexity"]) for n, r in results.items()}
    first = results["window"]
    text = INTRODUCTION.format(
        steps=first["steps"]["documents"],
        recall_steps=first["steps"]["recall"],
        cpu=first["machine"]["cpu"],
        cores=first["machine"]["cores"],
        torch=first["machine"]["torch"],
        documents=curves["window"].documents,
        tokens=tokens_of(curves["window"]),
        segment=curves["window"].segment_size,
        perplexity=table(perplexity_rows(curves)),
        base=table(base_rows(curves["window"])),
        reading=conclusion(curves),
        recall=table(recall_rows(results)),
        costs=table(cost_rows(results)),
    )
    (DOCS / "comparison.md").write_text(text)
    for path in sorted((DOCS / "methods").glob("*.md")):
        before, _, rest = path.read_text().partition(MARKS[0])
        old, _, after = rest.partition(MARKS[1])
        if path.stem in results:
            own = page(path.stem, results[path.stem], curves["window"])
        elif not old.strip():
            own = "Not among the memories of the [comparison](../comparison.md) yet."
        else:
            continue
        path.write_text(f"{before}{MARKS[0]}\n\n{own}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
