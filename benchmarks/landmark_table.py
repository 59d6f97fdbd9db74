"""Put the results of `landmark.py` and `offloading.py` into the pages of Landmark and InfLLM.

python benchmarks/landmark_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memwrap.evaluation.plots import plot_depths
from memwrap.evaluation.suite import Cell, SuiteResult

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MARKS = ("<!-- evidence:begin -->", "<!-- evidence:end -->")


def load(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def machine(values: dict[str, Any]) -> str:
    own = values["machine"]
    return f"{own['cpu']}, one thread on a busy machine, GPU: {own['gpu']}, torch {own['torch']}"


def retrieval(values: dict[str, Any], pictures: bool) -> str:
    """Accuracy by task, reading and length, with the figures where a page shows them."""
    cells = [Cell(**cell) for cell in values["cells"]]
    result = SuiteResult("", 0, 0, 0, cells)
    training = values["training"]
    names = ", ".join(f"`{name}`" for name in training["tasks"]["names"])
    text = (
        f"The shipped tiny LM (5.8M parameters, a context of 512) with landmarks "
        f"(`block_size={training['memory']['block_size']}`, `top_k={training['memory']['top_k']}`, "
        f"segments of {training['memory']['segment_size']}) and LoRA, trained on {names} for "
        f"{training['steps']} steps of {training['batch_size']} texts of at most "
        f"{values['length']} tokens (recipe `landmark_passkey_tiny`; loss of the answers "
        f"{training['first_loss']:.2f} at first, {training['last_loss']:.2f} at the end), then "
        f"read at up to {max(c.length for c in cells) // values['length']} times that length. "
        "RULER's needles (`niah_...`) were not trained on. "
        f'"infllm" is the untrained base with '
        f"`window_size={values['infllm']['window_size']}`, "
        f"`block_size={values['infllm']['block_size']}`, `top_k={values['infllm']['top_k']}`; the "
        f"other readings are those of [evaluation](../evaluation.md). {values['samples']} texts "
        f"each, with Wilson's 95 % intervals (`python benchmarks/landmark.py`; {machine(values)})."
        f"\n\n{verdict(cells, values)}\n\n{result.table()}"
    )
    for task in result.tasks():
        own = [cell for cell in cells if cell.task == task]
        if pictures and len({cell.length for cell in own}) > 2:
            plot_depths(own, DOCS / "figures" / f"landmark_{task}.png")
            text += (
                f"\n\nBy depth of the fact (down) and length (across), `{task}`:\n\n"
                f"![{task} by depth and length](../figures/landmark_{task}.png)"
            )
    return text


def verdict(cells: list[Cell], values: dict[str, Any]) -> str:
    """What the numbers say of each task that was trained on, in plain words."""
    said = []
    for task in values["training"]["tasks"]["names"]:
        own = {(c.curve, c.length): c for c in cells if c.task == task}
        lengths = sorted({length for _, length in own})
        if not lengths:
            continue
        first, last = (own["landmark", n] for n in (lengths[0], lengths[-1]))
        off = own["memory off", lengths[-1]]
        if first.accuracy < 0.5:
            said.append(
                f"`{task}` was not learned in this time ({first.accuracy:.2f} at the training "
                "length): its row says nothing of the method."
            )
            continue
        helped = "above" if last.low > off.high else "not clearly above"
        said.append(
            f"`{task}`: {first.accuracy:.2f} at the training length, {last.accuracy:.2f} at "
            f"{lengths[-1]:,} tokens, {helped} the same reading with the memory off "
            f"({off.accuracy:.2f})."
        )
    return " ".join(said)


def reading(values: dict[str, Any], name: str) -> str:
    """What one memory holds and takes, with and without offloading."""
    settings = ", ".join(f"`{k}={v}`" for k, v in values["settings"][name].items())
    rows = [["offload", "device, peak", "host, peak", "processor, ms a token",
             "of the first tenth", "of the last tenth", "slots: found / fetched"]]  # fmt: skip
    for own in values["readings"]:
        if own["memory"] == name:
            slots = f"{own['slot_hits']:,} / {own['slot_misses']:,}"
            rows.append(
                [
                    "yes" if own["offload"] else "no",
                    f"{own['device_bytes_peak'] / 1e6:,.1f} MB",
                    f"{own['host_bytes_peak'] / 1e6:,.1f} MB",
                    f"{own['cpu_ms_per_token']:.2f}",
                    f"{own['cpu_ms_per_token_first_tenth']:.2f}",
                    f"{own['cpu_ms_per_token_last_tenth']:.2f}",
                    slots if own["slot_hits"] + own["slot_misses"] else "-",
                ]
            )
    rows.insert(1, ["---"] * len(rows[0]))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    where = (
        " There is no GPU here: device and host are the same memory, and what is measured is the "
        "bookkeeping, not a transfer."
        if values["machine"]["gpu"] == "none"
        else ""
    )
    return (
        f"Reading {values['tokens']:,} tokens with the shipped tiny LM in float32, {settings} "
        f"(`python benchmarks/offloading.py`; {machine(values)}).{where}\n\n{table}"
    )


def main() -> None:
    tasks, costs = load("landmark"), load("offloading")
    for name in ("landmark", "infllm"):
        path = DOCS / "methods" / f"{name}.md"
        before, _, rest = path.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        own = f"{retrieval(tasks, name == 'landmark')}\n\n{reading(costs, name)}"
        path.write_text(f"{before}{MARKS[0]}\n\n{own}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
