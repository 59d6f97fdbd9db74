"""Write README.md of this folder from the recorded results.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def load(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def main() -> None:
    overhead, reading, streaming = load("overhead"), load("reading"), load("streaming")
    rows = [("measured", "value", "goal"), ("---", "---", "---")]
    for size in ("128", "512"):
        ratio = overhead[f"segment_{size}"]["wrapped_over_bare_plus_method"]
        spread = f"{ratio['median']:.3f} (quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f})"
        rows.append((f"one segment of {size}: wrapped / (bare + the method)", spread, "<= 1.05"))
        whole = overhead[f"segment_{size}"]["wrapped_over_bare"]["median"]
        rows.append((f"one segment of {size}: wrapped / bare", f"{whole:.3f}", ""))
    tokens = f"{reading['tokens']:,} tokens"
    ratio = reading["time_end_over_32k"]
    rows += [
        (f"reading {tokens}: resident memory, last / first tenth",
         f"{reading['memory_last_over_first']:.4f}", "<= 1.02"),
        (f"reading {tokens}: time a token at the end / at 32,000",
         f"{ratio['median']:.3f} (quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f})", "<= 1.05"),
        (f"reading {tokens}: tokens a second", f"{reading['tokens_per_second']:,.0f}", ""),
        ("training step, streaming: peak memory, 64 / 8 segments",
         f"{streaming['streaming_64_over_8']:.3f}", "<= 1.1"),
        ("training step, one graph: peak memory, 64 / 8 segments",
         f"{streaming['one_graph_64_over_8']:.3f}", ""),
    ]  # fmt: skip
    machine = reading["machine"]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    text = (
        "# Benchmarks\n\n"
        "Written by `python benchmarks/table.py` from `results/*.json`; run `benchmarks/run_all` "
        "to measure again. ARMT on the shipped LM.\n\n" + "\n".join(lines) + "\n\n"
        f"Machine: {machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu']}; Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}. "
        "Other work may have run beside; ratios are of interleaved pairs. Not measured on a GPU "
        "yet.\n"
    )
    (HERE / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
