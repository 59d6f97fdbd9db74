"""Put the results of `memwrap bench memories` on the tiny LM into docs/comparison_tiny.md and the
memories' own pages.

memwrap bench memories -o benchmarks/results/memories
python benchmarks/memories_table.py
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from pages import DOCS, HERE, load, put

from memwrap.comparison.plots import plot_comparison
from memwrap.comparison.runs import BASE, read_results
from memwrap.comparison.tables import load_curves, page, recall_table, tokens_of
from memwrap.evaluation.controls import MEMORY, OFF, SHUFFLED, WINDOW
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.evaluation.report import markdown

COMMAND = "memwrap bench memories"
# What a method's paper claims that this comparison can speak to: of perplexity, or of recall.
CLAIMS = {
    "rmt": ("recall", "facts survive far beyond the training length (Bulatov et al. 2023)"),
    "armt": ("recall", "a fact is found far beyond the training length (arXiv 2407.04841)"),
    "hmt": ("perplexity", "lower perplexity than reading without the memory (NAACL 2025)"),
    "autocompressor": ("perplexity", "summary vectors lower perplexity (EMNLP 2023)"),
    "memoryprompt": ("recall", "facts that change are tracked (2024)"),
    "infini": ("recall", "a passkey is found far beyond the training length (arXiv 2404.07143)"),
    "compressive": ("perplexity", "older text, compressed, lowers perplexity (arXiv 1911.05507)"),
    "window": ("perplexity", "stable reading far beyond the window (arXiv 2309.17453)"),
    "memorizing": ("perplexity", "retrieved keys lower perplexity (arXiv 2203.08913)"),
    "neurocache": ("perplexity", "retrieved states lower perplexity (arXiv 2407.02486)"),
    "infllm": ("recall", "facts are found without training for it (arXiv 2402.04617)"),
    "landmark": ("recall", "blocks of any age are found by their landmarks (arXiv 2305.16300)"),
    "knnlm": ("perplexity", "neighbours' next tokens lower perplexity (2020)"),
}


def own_page(name: str, result: dict[str, Any], curves: PerplexityResult) -> str:
    """What stands in a memory's own page."""
    documents, recall = result["settings"]["documents"], result["settings"]["recall"]
    settings = [", ".join(f"`{k}={v}`" for k, v in part.items()) for part in (documents, recall)]
    tasks = "\n\n".join(f"{t}\n\n{recall_table(v)}" for t, v in result["recall"].items())
    note = f" {name} {result['note']}." if result["note"] else ""
    return (
        f"The shipped tiny LM, one run, seed {result['seed']} (`{COMMAND} --only {name}`; all "
        f"memories side by side: [comparison](../comparison_tiny.md)).{note}\n\n"
        f"Nats per token by segment on {curves.documents} held-out documents of "
        f"{tokens_of(curves):,} tokens, after {result['steps']['documents']} steps with "
        f"{settings[0]}:\n\n{curves.table()}\n\n{beside_window(curves)}"
        f"Associative recall by distance, after {result['steps']['recall']} steps with "
        f"{settings[1]}:\n\n{tasks}"
    )


def beside_window(curves: PerplexityResult) -> str:
    """Whether it was worth more than the trivial bounded memory."""
    found = curves.curves.get(WINDOW)
    if found is None:
        return ""
    gain, error = found.gain, found.gain_error
    size = f"{abs(gain):.3f} ± {error:.3f} nats a token"
    if abs(gain) <= 2 * error:
        return f"No different here from the untrained base with a window and sinks ({size}).\n\n"
    if gain > 0:
        return f"Better here than the untrained base with a window and sinks, by {size}.\n\n"
    return f"**Does not beat** the untrained base with a window and sinks here: {size} worse.\n\n"


def reach(accuracy: dict[int, float]) -> int:
    """The distance up to which it is right at least every other time."""
    return max(takewhile(lambda distance: accuracy[distance] >= 0.5, sorted(accuracy)), default=0)


def claims(results: dict[str, Any], curves: dict[str, PerplexityResult]) -> str:
    """What papers claim, and whether it is seen here; linearizations are judged by their own
    benchmark."""
    lines = [["memory", "its paper claims (cited)", "here", "seen at this scale"]]
    for name, (kind, claim) in CLAIMS.items():
        if name not in results:
            continue
        if kind == "perplexity":
            worth = [(curves[name].curves[c].gain, curves[name].curves[c].gain_error)
                     for c in (OFF, SHUFFLED)]  # fmt: skip
            here = "; ".join(
                f"{label} {gain:+.3f} ± {error:.3f}"
                for label, (gain, error) in zip(("off", "shuffled"), worth, strict=True)
            )
            seen = "yes" if all(gain > 2 * error for gain, error in worth) else "**no**"
        else:
            values = results[name]["recall"]["rewrite"]
            found = dict(zip(values["distances"], values["accuracy"][MEMORY], strict=True))
            trained = values["task"]["num_pairs"]
            far = max(found)
            here = f"{found[trained]:.2f} at {trained}, {found[far]:.2f} at {far} segments"
            reached = reach(found)
            seen = "yes" if reached == far else f"up to {reached} segments"
            seen = seen if reached > trained else "**no**"
        lines.append([f"[{name}](methods/{name}.md)", claim, here, seen])
    return (
        "\n## What the papers claim\n\n"
        "Claims are the papers', of other models, data and budgets. For perplexity the columns "
        "give what reading without the memory, or with another document's, costs in nats: a claim "
        "is seen where both are worse by more than two standard errors. For recall (*rewrite*): "
        "right at least every other time at the largest distance, or up to the one that is named "
        'if that is more than the training had. "No" says that this budget on this model did not '
        "show it, not that the paper is wrong.\n\n" + markdown(lines) + "\n" + longer()
    )


def longer() -> str:
    """What landmark attention does after more training than the comparison gives."""
    found = load("landmark").get("tasks")
    if not found:
        return ""
    cells = {(c["curve"], c["length"]): c["accuracy"]
             for c in found["cells"] if c["task"] == "passkey"}  # fmt: skip
    far = max(length for _, length in cells)
    return (
        f"\nMore training on one task than this budget gives: all of the tiny LM trained for "
        f"{found['training']['seconds'] / 60:.0f} minutes on `passkey` with `landmark`, on texts "
        f"of at most {found['length']} tokens, finds {cells['landmark', found['length']]:.2f} of "
        f"the keys there and {cells['landmark', far]:.2f} at {far:,} tokens, "
        f"{cells['memory off', far]:.2f} with the memory off ([landmark](methods/landmark.md)).\n"
    )


def main() -> None:
    results = read_results(HERE / "results" / "memories")
    curves = load_curves(results)
    text = page(results, COMMAND, link="[{0}](methods/{0}.md)")
    title, _, rest = text.partition("\n\n")
    figure = "![Nats per token and recall of all memories](figures/comparison.png)"
    title += ": the tiny LM"
    text = f"{title}\n\n{figure}\n\n{rest}{claims(results, curves)}"
    (DOCS / "comparison_tiny.md").write_text(text)
    plot_comparison(results, DOCS / "figures" / "comparison.png")
    for path in sorted((DOCS / "methods").glob("*.md")):
        own = "Not among the memories of the [comparison](../comparison_tiny.md) yet."
        if path.stem in results and path.stem != BASE:
            own = own_page(path.stem, results[path.stem], curves[path.stem])
        put(f"methods/{path.name}", "comparison", own)


if __name__ == "__main__":
    main()
