"""Put the results of `linearized.py` and `linear_ops.py` into the pages of AHN, Liger and LoLCATs.

python benchmarks/linearized_table.py
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from pages import load, of_machine, put, table

from memwrap.evaluation.controls import FULL, MEMORY, WINDOW
from memwrap.evaluation.perplexity import PerplexityResult
from memwrap.training.recipe import load_recipe

BRANCHES = {MEMORY: "both branches", "only window": "window alone",
            "only recurrent": "recurrence alone"}  # fmt: skip


def worth(result: PerplexityResult, spans: range, other: str) -> float:
    """How much better reading with both branches is than another reading, in nats a token."""
    sizes = [b - a for a, b in pairwise(result.edges)]
    total = sum(sizes[s] for s in spans)
    mean = {k: sum(sizes[s] * result.curves[k].mean[s] for s in spans) for k in (MEMORY, other)}
    return (mean[other] - mean[MEMORY]) / total


def verdict(result: PerplexityResult, tokens: int) -> str:
    """What the recurrence is worth, within the `tokens` that were trained on and at the end."""
    within = range(max(1, sum(edge <= tokens for edge in result.edges) - 1))
    last = len(result.edges) - 2
    said = []
    for spans, where in (
        (within, "Within the length it was trained on"), (range(last, last + 1), "At the end")
    ):  # fmt: skip
        alone, base = (worth(result, spans, other) for other in ("only window", WINDOW))
        better = "better" if alone > 0 else "worse"
        beyond = "better" if base > 0 else "worse"
        said.append(
            f"{where} the trained model is {abs(alone):.2f} nats {better} than its window "
            f"alone and {abs(base):.2f} {beyond} than the untrained base with window and sinks."
        )
    whole = result.curves["only window"]
    said.append(
        f"Over all tokens the recurrence is worth {whole.gain:.3f} ± {whole.gain_error:.3f} nats a "
        "token (standard error across documents)."
    )
    return " ".join(said)


def quality(name: str, values: dict[str, Any]) -> str:
    own = values[name]
    results = {n: PerplexityResult.from_dict(own[n]) for n in ("untrained", "trained")}
    edges = results["trained"].edges
    spans = [f"trained, tokens {a:,} to {b - 1:,}" for a, b in pairwise(edges)]
    rows = [["nats per token", "untrained, all", "trained, all", *spans]]
    window = own["settings"]["window_size"]
    base = {WINDOW: f"base, window of {window} and sinks", FULL: "base, full context"}
    for key, said in (BRANCHES | base).items():
        curves = [results[n].curves[key] for n in ("untrained", "trained")]
        shown = ["-" if math.isnan(v) else f"{v:.3f}" for v in curves[1].mean]
        # The base is the same in both; beyond its context it was followed only so far.
        trained = "" if key in base else f"{curves[1].overall:.3f}"
        rows.append([said, f"{curves[0].overall:.3f}", trained, *shown])
    stages = " and then ".join(
        f"`memwrap train {' '.join([stage['recipe'], *stage['overrides']])}` ({stage['steps']} "
        "steps)"
        for stage in own["training"]
    )
    tokens = load_recipe(own["training"][-1]["recipe"]).data.max_tokens
    minutes = sum(stage["minutes"] for stage in own["training"])
    return (
        f"**Quality.** The shipped tiny LM, {values['documents']} held-out documents of "
        f"{values['tokens']:,} tokens, seed 0; trained for {minutes:.0f} minutes on texts of "
        f'{tokens} tokens by {stages}. The base\'s "full context" goes beyond the 512 tokens it '
        f"was trained on.\n\n{table(rows)}\n\n{verdict(results['trained'], tokens)}"
    )


def decoding(name: str, values: list[dict[str, Any]]) -> str:
    rows = [["tokens read", "base, tokens a second", f"{name}", f"{name} / base",
             "base's cache", f"state of {name}"]]  # fmt: skip
    for own in values:
        speed, kept = own["tokens_per_second"], own["bytes"]
        rows.append([
            f"{own['tokens']:,}", f"{speed['base']:.0f}", f"{speed[name]:.0f}",
            f"{own['over_base'][name]:.2f}", f"{kept['base'] / 1e6:.1f} MB",
            f"{kept[name] / 1e6:.2f} MB",
        ])  # fmt: skip
    return (
        "**Decoding.** One token at a time behind so many, with default settings, medians of steps "
        "taken in turns, beside the base with its cache of keys and values (float32, on a CPU)."
        f"\n\n{table(rows)}"
    )


def ops(values: dict[str, Any]) -> str:
    measured = {n: own for n, own in values.items() if isinstance(own, dict) and "reading" in own}
    kinds = list(next(iter(measured.values())))
    most = max(kind["threads"] for kind in next(iter(measured.values())).values())
    titles = [kind.replace("all threads", f"{most} threads") for kind in kinds]
    rows = [["recurrence", "heads", *titles]]
    for name, own in measured.items():
        form, heads = name.rsplit(", ", 1)
        rows.append([form, heads.split()[0], *(f"{own[k]['naive_over_torch']:.1f}" for k in kinds)])
    return (
        "**The recurrences on a CPU.** Time of the specification (a loop over tokens) over that of "
        "chunked torch, 4,096 tokens of width 64, on one thread where no number is given; "
        f"{most} is what torch takes here. Training is forward and backward. The loop does "
        f"all heads in one step, so that more heads make up for its slowness.\n\n{table(rows)}"
    )


def main() -> None:
    values, speeds = load("linearized"), load("linear_ops")
    for name in ("ahn", "liger", "lolcats"):
        parts = []
        if name in values.get("quality", {}):
            parts.append(quality(name, values["quality"]))
        if "decoding" in values:
            parts.append(decoding(name, values["decoding"]))
        if speeds and name == "liger":
            parts.append(ops(speeds))
        where = of_machine((values or speeds)["machine"])
        parts.append(f"Made by `python benchmarks/linearized.py` and `linear_ops.py` on {where}.")
        put(f"methods/{name}.md", "linearized", "\n\n".join(parts))


if __name__ == "__main__":
    main()
