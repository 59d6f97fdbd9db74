"""Put the results of `memwrap bench memories` into docs/comparison.md and the memories' own pages.

memwrap bench memories -o benchmarks/results/memories
python benchmarks/memories_table.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memwrap.evaluation.comparison import BASE, read_results
from memwrap.evaluation.comparison_tables import load_curves, page, recall_table, tokens_of
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.plots import plot_comparison

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MARKS = ("<!-- comparison:begin -->", "<!-- comparison:end -->")
COMMAND = "memwrap bench memories"


def own_page(name: str, result: dict[str, Any], curves: PerplexityResult) -> str:
    """What stands in a memory's own page."""
    documents, recall = result["settings"]["documents"], result["settings"]["recall"]
    settings = [", ".join(f"`{k}={v}`" for k, v in part.items()) for part in (documents, recall)]
    tasks = "\n\n".join(f"{t}\n\n{recall_table(v)}" for t, v in result["recall"].items())
    note = f" {name} {result['note']}." if result["note"] else ""
    return (
        f"The shipped tiny LM, one run, seed {result['seed']} (`{COMMAND} --only {name}`; all "
        f"memories side by side: [comparison](../comparison.md)).{note}\n\n"
        f"Nats per token by segment on {curves.documents} held-out documents of "
        f"{tokens_of(curves):,} tokens, after {result['steps']['documents']} steps with "
        f"{settings[0]}:\n\n{curves.table()}\n\n"
        f"Associative recall by distance, after {result['steps']['recall']} steps with "
        f"{settings[1]}:\n\n{tasks}"
    )


def main() -> None:
    results = read_results(HERE / "results" / "memories")
    curves = load_curves(results)
    text = page(results, COMMAND, link="[{0}](methods/{0}.md)")
    title, _, rest = text.partition("\n\n")
    figure = "![Nats per token and recall of all memories](figures/comparison.png)"
    (DOCS / "comparison.md").write_text(f"{title}\n\n{figure}\n\n{rest}")
    plot_comparison(results, DOCS / "figures" / "comparison.png")
    for path in sorted((DOCS / "methods").glob("*.md")):
        before, _, rest = path.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        own = "Not among the memories of the [comparison](../comparison.md) yet."
        if path.stem in results and path.stem != BASE:
            own = own_page(path.stem, results[path.stem], curves[path.stem])
        path.write_text(f"{before}{MARKS[0]}\n\n{own}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
