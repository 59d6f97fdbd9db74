"""Put the results of `landmark.py` and `offloading.py` into the pages of Landmark and InfLLM.

python benchmarks/landmark_table.py
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pages import DOCS, load, put, table

from memwrap.evaluation.plots import plot_depths
from memwrap.evaluation.suite import Cell, SuiteResult


def machine(values: dict[str, Any]) -> str:
    own = values["machine"]
    return f"{own['cpu']}, one thread on a busy machine, GPU: {own['gpu']}, torch {own['torch']}"


def recall(values: dict[str, Any], picture: Path | None) -> str:
    """Associative recall by pairs, with the heat map where a page shows it."""
    training = values["training"]
    own = training["recipe"]
    most, size = own["recall"]["num_pairs"], own["memory"]["segment_size"]
    counts = sorted({cell["pairs"] for cell in values["cells"]})
    rows = [["reading", *[f"{n} pairs" for n in counts]]]
    mean = {(c["curve"], c["pairs"]): sum(c["depth"]) / len(c["depth"]) for c in values["cells"]}
    for curve in dict.fromkeys(cell["curve"] for cell in values["cells"]):
        rows.append([curve, *[f"{mean[curve, n]:.2f}" for n in counts]])
    around = "; ".join(
        f"{name}: " + ", ".join(f"`{k}={v}`" for k, v in settings.items())
        for name, settings in values["around"].items()
    )
    text = (
        f"**Associative recall.** A small model from scratch (recipe `landmark_recall_tiny`) "
        f"learned to store pairs of a key (one of 16 symbols, which may come again: its last value "
        f"counts) and a value, one a block of {size} tokens, and to answer for a key: "
        f"{training['steps']} steps with at most {most} pairs, loss "
        f"{training['first_loss']:.2f} at first, {training['last_loss']:.2f} at the end. A "
        f"query reads {own['memory']['top_k']} blocks a head. Share of right answers among more "
        f"pairs, the one asked for at five depths, {values['samples']} samples each; chance is "
        f"0.06. Window and InfLLM stand around the same trained backbone, without landmarks "
        f'({around}); "base, truncated" is that backbone alone on its last 64 tokens.'
        f"\n\n{table(rows)}"
    )
    if picture is not None:
        cells = [
            SimpleNamespace(curve=c["curve"], length=c["pairs"], depth=c["depth"])
            for c in values["cells"]
        ]
        plot_depths(cells, picture)
        text += (
            "\n\nBy depth of the pair asked for (down) and number of pairs (across):\n\n"
            f"![recall by depth and number of pairs](../figures/{picture.name})"
        )
    return text


def retrieval(values: dict[str, Any], pictures: bool) -> str:
    """Accuracy by task, reading and length, with the figures where a page shows them."""
    cells = [Cell(**cell) for cell in values["cells"]]
    training, own = values["training"], values["training"]["recipe"]
    names = ", ".join(f"`{name}`" for name in own["tasks"]["names"])
    longest = max(c.length for c in cells)
    text = (
        f"**Passkey and RULER.** The shipped tiny LM (5.8M parameters, a context of 512) "
        f"with landmarks (`block_size={own['memory']['block_size']}`, "
        f"`top_k={own['memory']['top_k']}`, segments of {own['memory']['segment_size']}), all of "
        f"it trained on {names} for {training['steps']} steps of {training['batch_size']} texts of "
        f"at most {values['length']} tokens (recipe `landmark_passkey_tiny`; loss of the answers "
        f"{training['first_loss']:.2f} at first, {training['last_loss']:.2f} at the end), then "
        f"read at up to {longest // values['length']} times that length. All readings have the "
        f'same trained backbone: "infllm" with `window_size={values["infllm"]["window_size"]}`, '
        f"`block_size={values['infllm']['block_size']}`, `top_k={values['infllm']['top_k']}`; the "
        f"others are those of [evaluation](../evaluation.md). {values['samples']} texts "
        f"each.\n\n{verdict(cells, own)}"
    )
    found = {cell.task for cell in cells if cell.accuracy}
    empty = [cell for cell in cells if cell.task not in found]
    if empty:
        text += f" No reading found anything, those around it no more than it: {nothing(empty)}."
    if not found:
        return text
    result = SuiteResult("", 0, 0, 0, [cell for cell in cells if cell.task in found])
    text += f"\n\nIn brackets Wilson's 95 % intervals:\n\n{result.table()}"
    for task in result.tasks():
        mine = [cell for cell in cells if cell.task == task]
        if pictures and len({cell.length for cell in mine}) > 2:
            plot_depths(mine, DOCS / "figures" / f"landmark_{task}.png")
            text += (
                f"\n\nBy depth of the fact (down) and length (across), `{task}`:\n\n"
                f"![{task} by depth and length](../figures/landmark_{task}.png)"
            )
    return text


def nothing(cells: list[Cell]) -> str:
    """What was asked for, where a table would hold zeros alone."""
    lengths: dict[str, list[int]] = {}
    for cell in cells:
        lengths.setdefault(cell.task, []).append(cell.length)
    return "; ".join(
        f"`{task}` at {', '.join(f'{n:,}' for n in sorted(set(found)))} tokens"
        for task, found in lengths.items()
    )


def verdict(cells: list[Cell], recipe: dict[str, Any]) -> str:
    """What the numbers say of each task that was trained on, in plain words."""
    said = []
    for task in recipe["tasks"]["names"]:
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
    others = [f"`{task}`" for task in dict.fromkeys(c.task for c in cells)
              if task not in recipe["tasks"]["names"]]  # fmt: skip
    if others:
        said.append(f"It was not trained on {', '.join(others)}.")
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
    where = (
        " There is no GPU here: device and host are the same memory, and what is measured is the "
        "bookkeeping, not a transfer."
        if values["machine"]["gpu"] == "none"
        else ""
    )
    return (
        f"**Reading.** {values['tokens']:,} tokens with the shipped tiny LM in float32, {settings} "
        f"(`python benchmarks/offloading.py`; {machine(values)}).{where}\n\n{table(rows)}"
    )


def evidence(name: str, tasks: dict[str, Any], costs: dict[str, Any]) -> str:
    """What stands in one page."""
    parts = []
    figures = DOCS / "figures"
    if "recall" in tasks:
        picture = figures / "landmark_recall.png" if name == "landmark" else None
        parts.append(recall(tasks["recall"], picture))
    if "tasks" in tasks:
        parts.append(retrieval(tasks["tasks"], name == "landmark"))
    if parts:
        parts.append(f"Made by `python benchmarks/landmark.py` on {machine(tasks)}.")
    if costs:
        parts.append(reading(costs, name))
    return "\n\n".join(parts)


def main() -> None:
    tasks, costs = load("landmark"), load("offloading")
    for name in ("landmark", "infllm"):
        # Beside the evidence of `memories_table.py`, which has marks of its own.
        put(f"methods/{name}.md", "retrieval", evidence(name, tasks, costs))


if __name__ == "__main__":
    main()
