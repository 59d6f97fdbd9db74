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


def infini_rows(infini: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The compressive memory on a CPU, both updates."""
    rows = []
    for update in ("linear", "delta"):
        own = infini[update]
        name = f"compressive memory ({update})"
        faster = f"{own['naive']['naive_over_torch']:.0f}"
        rows.append((f"{name}, 4,096 tokens: naive / torch", faster, ">= 5"))
        for shape, found in own["peer"].items():
            share = 2 * found["products_alone"] / found["reading"]["milliseconds"]["peer"]
            whole = "the matrix products alone, of the time in which 2 would be reached"
            rows.append((f"{name}, reading, {shape}: {whole}", f"{share:.0%}", ""))
            for kind in ("reading", "training"):
                ratio = found[kind]["peer_over_memwrap"]
                spread = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
                rows.append(
                    (
                        f"{name}, {kind}, {shape}: infini-transformer-pytorch / memwrap",
                        spread,
                        ">= 2",
                    )
                )
        for kind in ("reading", "training"):
            lengths = own[f"{kind}_by_length"]
            first, last = min(lengths, key=int), max(lengths, key=int)
            for what, unit in (("microseconds_per_token", "µs"), ("bytes_per_token", "bytes")):
                a, b = (lengths[length][what] for length in (first, last))
                values = f"{a:,.1f} / {b:,.1f} {unit}"
                rows.append((f"{name}, {kind}: a token of {first} / of {last}", values, "flat"))
    return rows


MISSED = (
    "The last three rows were measured on an AMD EPYC on which about ten other processes ran; they "
    "miss their goals (1.8, 2.3 and 2.24). In a profile of one segment, of what a layer's memory "
    "takes (all six layers), `infllm` spent 37 of 95 ms on attention whose weights are written "
    "out (at best 2.2 ms a layer, of which the two products are 1.3), 13 on the selection, 11 on "
    "writing and 10 on turning and joining keys; `landmark` 25 of 83 on the grouped reading of "
    "blocks, 16 on the segment's own attention and 16 on writing; `extended_mind` 34 of 67 on the "
    "search (the product with all entries is at best 1.3 ms a layer) and 10 on reading what it "
    "gave. A segment took 3,489 operations in `infllm`, 3,196 in `landmark` and 1,820 in "
    "`extended_mind` before they were made faster, where the bare model has 450.\n\n"
)


def speed_text(model: str) -> str:
    """What each memory costs beside a bare model, now and before the last large change."""
    found = load(f"speed_{model}")
    before = load(f"speed_{model}_before")
    lines = [
        f"## Beside the bare model: {model}, segments of {found['segment']}\n",
        "Times over the bare model's (`python speed.py`, one thread, CPU time): reading a segment "
        "with full buffers, reading a text's first segment, decoding a token; and the operations "
        f"of that token (the bare model's: {found['base_operations']:,}). In brackets: before "
        "attention to memories stayed on the flash kernel. Machine: "
        f"{found['machine']['cpu']}, torch {found['machine']['torch']}.\n",
        "| memory | read | first | decode | operations |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in found.items():
        if isinstance(values, dict) and "read" in values:
            old = before.get(name, {})
            cells = [
                f"{values[kind]:,.6g}" + (f" ({old[kind]:,.6g})" if old else "")
                for kind in ("read", "first", "decode", "operations")
            ]
            lines.append(" | ".join(["| " + name, *cells]) + " |")
    return "\n".join(lines) + "\n\n" + (MISSED if "landmark" in found else "")


def kernels_text() -> str:
    """Which GPUs the Triton kernels were measured on."""
    found = sorted((HERE / "results").glob("kernels_*.json"))
    if not found:
        return "The Triton kernels are not yet measured on a GPU (`kernels/on_gpu.py` does it).\n"
    names = ", ".join(f"`results/{path.name}`" for path in found)
    return f"The Triton kernels, with the GPU named: {names}.\n"


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
        ("training step, one call: peak memory, 64 / 8 segments",
         f"{streaming['one_call_64_over_8']:.3f}", "<= 1.1"),
        ("training step, one graph: peak memory, 64 / 8 segments",
         f"{streaming['one_graph_64_over_8']:.3f}", ""),
    ]  # fmt: skip
    rows += infini_rows(load("infini_ops"))
    machine = reading["machine"]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    text = (
        "# Benchmarks\n\n"
        "Written by `python benchmarks/table.py` from `results/*.json`; run `benchmarks/run_all` "
        "to measure again. The first rows are ARMT on the shipped LM, the others the ops alone, on "
        "one thread.\n\n" + "\n".join(lines) + "\n\n"
        f"Machine: {machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu']}; Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}. "
        "Other work may have run beside; ratios are of interleaved pairs.\n\n"
        + "".join(speed_text(model) for model in ("tiny-lm", "smollm2"))
        + kernels_text()
    )
    (HERE / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
