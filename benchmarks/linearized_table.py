"""Put the results of `linearized.py` and `linear_ops.py` into the pages of Liger and LoLCATs.

python benchmarks/linearized_table.py
"""

from __future__ import annotations

from typing import Any

from pages import load, of_machine, put, table

from memwrap.evaluation.controls import FULL, MEMORY, WINDOW
from memwrap.evaluation.perplexity import PerplexityResult

BRANCHES = {MEMORY: "both branches", "only window": "window alone",
            "only recurrent": "recurrence alone"}  # fmt: skip


def curves(values: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Nats per token by conversion (untrained, trained) and reading."""
    results = {kind: PerplexityResult.from_dict(values[kind]) for kind in ("untrained", "trained")}
    return {
        kind: {name: curve.overall for name, curve in result.curves.items()}
        for kind, result in results.items()
    }


def verdict(own: dict[str, float]) -> str:
    """What the branches are worth, in plain words."""
    alone = own["only window"] - own[MEMORY]
    missed = own[MEMORY] - own[WINDOW]
    branch = (
        f"After training the recurrence is worth {alone:.3f} nats to its window"
        if alone > 0
        else f"After training the window alone is better by {-alone:.3f} nats than both branches"
    )
    return f"{branch}; both together are {abs(missed):.3f} nats " + (
        "worse than the untrained base with window and sinks."
        if missed > 0
        else "better than the untrained base with window and sinks."
    )


def quality(name: str, values: dict[str, Any]) -> str:
    own = curves(values[name])
    settings = values[name]["settings"]
    rows = [["nats per token", "untrained", "trained"]]
    for key, said in BRANCHES.items():
        rows.append([said, *[f"{own[kind][key]:.3f}" for kind in ("untrained", "trained")]])
    window = settings["window_size"]
    for key, said in (
        (WINDOW, f"base, window of {window} and sinks"),
        (FULL, "base, full context"),
    ):
        rows.append([said, f"{own['untrained'][key]:.3f}", "-"])
    stages = " and then ".join(
        f"`memwrap train {' '.join([stage['recipe'], *stage['overrides']])}`"
        for stage in values[name]["training"]
    )
    minutes = sum(stage["minutes"] for stage in values[name]["training"])
    return (
        f"**Quality.** The shipped tiny LM, {values['documents']} held-out documents of "
        f"{values['tokens']:,} tokens, seed 0; trained for {minutes:.0f} minutes by {stages}. "
        'The base\'s "full context" goes beyond the 512 tokens it was trained on.\n\n'
        f"{table(rows)}\n\n{verdict(own['trained'])}"
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
        "**Decoding.** One token at a time behind so many, medians of steps taken in turns, beside "
        f"the base with its cache of keys and values (float32, on a CPU).\n\n{table(rows)}"
    )


def ops(values: dict[str, Any]) -> str:
    rows = [["recurrence", "heads", "reading", "training"]]
    for name, own in values.items():
        if not isinstance(own, dict) or "reading" not in own:
            continue
        form, heads = name.rsplit(", ", 1)
        ratios = [f"{own[kind]['naive_over_torch']:.1f}" for kind in ("reading", "training")]
        rows.append([form, heads.split()[0], *ratios])
    return (
        "**The recurrences on a CPU.** Processor time of the specification (a loop over tokens) "
        "over that of chunked torch, 4,096 tokens of width 64; training is forward and backward. "
        "The loop does all heads in one step, so that more heads make up for its slowness."
        f"\n\n{table(rows)}"
    )


def main() -> None:
    values, speeds = load("linearized"), load("linear_ops")
    for name in ("liger", "lolcats"):
        parts = []
        if "quality" in values:
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
