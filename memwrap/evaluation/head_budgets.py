"""How many slots each head should get: what its attention loses with few, over some documents.

Published shares are found by changing one head's slots at a time and measuring the loss of the
whole model, a run for each head. Here the error of a head's own output stands for that: it is
measured for all heads in one pass a size, and slots go where they take most of it away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.io.atomic_files import write_text
from memwrap.model.memory_model import MemoryModelForCausalLM

FORMAT, VERSION = "memwrap-head-budgets", 1
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the slots asked for


@dataclass(frozen=True)
class HeadBudgets:
    """Shares of all slots by layer and KV head.

    Attributes:
        shares: by name, `"L0H0"`; their sum is 1.
        errors: of each head's output with `sizes` slots, in parts of its layer's output.
        sizes: slots of a head.
        documents: measured on so many.
    """

    shares: dict[str, float]
    errors: dict[str, list[float]]
    sizes: list[int]
    documents: int

    def save(self, path: Path) -> None:
        """Write them as a JSON file."""
        about = {"format": FORMAT, "version": VERSION, "sizes": self.sizes}
        about |= {"documents": self.documents, "shares": self.shares, "errors": self.errors}
        write_text(path, json.dumps(about, indent=2) + "\n")

    def table(self) -> str:
        """Write the extremes and what is expected of the shares."""
        order = sorted(self.shares, key=self.shares.__getitem__)
        even = 1 / len(order)
        lines = [f"{n}: {self.shares[n] / even:.2f} times an even share" for n in order]
        return "\n".join(["most:", *lines[:-6:-1], "least:", *lines[:5]])


@torch.no_grad()
def head_budgets(
    model: MemoryModelForCausalLM, rows: Sequence[Tensor], *, progress: bool = False
) -> HeadBudgets:
    """Measure shares for a model with the memory `compact` and `memory_size=None`.

    Args:
        model: reads the documents with full attention; its `slots` are those of a head on average.
        rows: ids `(T,)` of documents, each longer than `4 * slots`.
        progress: show a bar.

    Raises:
        ValueError: for another memory, or documents that are too short.
    """
    memory: Any = model.memories.get("compact")
    if memory is None or memory.config.memory_size is not None:
        raise ValueError(
            "Budgets of heads are measured with the memory compact that keeps all of a document: "
            "--memory compact memory_size=null."
        )
    slots = memory.config.slots
    sizes = sorted({max(1, int(slots * size)) for size in SIZES})
    short = [len(row) for row in rows if len(row) <= sizes[-1] + memory.config.num_sinks]
    if short or not len(rows):
        raise ValueError(
            f"A document has {min(short, default=0)} tokens; {slots} slots are judged on at least "
            f"{sizes[-1] + memory.config.num_sinks + 1}."
        )
    total: dict[str, Tensor] = {}
    steps = tqdm(total=len(rows) * len(sizes), desc="head budgets", disable=not progress)
    for row in rows:
        state = model.close_segment(model.read(row[None]))
        for number, size in enumerate(sizes):
            for layer, error in model.compaction_errors(state, size).items():
                for head, value in enumerate(error.tolist()):
                    name = f"L{layer}H{head}"
                    total.setdefault(name, torch.zeros(len(sizes)))[number] += value / len(rows)
            steps.update()
    steps.close()
    errors = {name: values.tolist() for name, values in total.items()}
    return HeadBudgets(shares_of(errors, sizes, slots), errors, sizes, len(rows))


def shares_of(errors: dict[str, list[float]], sizes: Sequence[int], slots: int) -> dict[str, float]:
    """Give slots out one part after the other, each to the head whose error falls most by it.

    Args:
        errors: of each head at `sizes` slots; what lies between is a straight line, and an error
            that rises with more slots counts as one that stays.
        sizes: ascending.
        slots: of a head on average.

    Returns:
        Shares, sum 1; none below a quarter of an even one, none above four times.
    """
    steps: list[tuple[float, str, int]] = []
    for name, values in errors.items():
        lowest = values[0]
        gains = []
        for (low, high), value in zip(pairwise(sizes), values[1:], strict=True):
            new = min(lowest, value)
            gains.append((lowest - new) / (high - low))
            lowest = new
        for number in range(len(gains) - 1, 0, -1):  # later steps never before earlier ones
            gains[number - 1] = max(gains[number - 1], gains[number])
        steps += [(gain, name, number) for number, gain in enumerate(gains)]
    given = dict.fromkeys(errors, sizes[0])
    left = slots * len(errors) - sum(given.values())
    for _, name, number in sorted(steps, key=lambda s: (-s[0], s[2], s[1])):
        part = min(left, sizes[number + 1] - sizes[number])
        given[name] += part
        left -= part
    whole = sum(given.values())
    return {name: count / whole for name, count in given.items()}


__all__ = ["HeadBudgets", "head_budgets", "shares_of"]
