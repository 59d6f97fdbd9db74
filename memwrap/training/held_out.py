"""Whether training made the memory worth reading: held-out rows with it, and with it off."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.tasks import task
from memwrap.training.batches import IGNORED

ROWS, TOKENS = 16, 8192
"""Rows that are read, and the most tokens of all together (but at least two rows)."""
Row = dict[str, Tensor]


def held_back(dataset: Dataset) -> tuple[Dataset, Dataset | None]:
    """Keep the last rows of documents away from training, one in twenty, at most `ROWS`; none of
    fewer than forty, since a single row says nothing of the error."""
    total = len(dataset)  # type: ignore[arg-type]
    count = min(ROWS, total // 20)
    if count < 2:
        return dataset, None
    first = total - count
    return Subset(dataset, range(first)), Subset(dataset, range(first, total))


def task_rows(
    names: list[str], tokenizer: PreTrainedTokenizerBase, low: int, high: int
) -> Iterator[Row]:
    """Make rows of tasks with the seeds of evaluation, of lengths drawn between the two."""
    draw = random.Random(0)
    for seed in range(10**6):
        chosen = task(names[seed % len(names)])
        row = chosen.sample(tokenizer, draw.randint(low, high), seed).training_row(
            tokenizer.eos_token_id if chosen.ends else None
        )
        yield {name: torch.tensor(values) for name, values in row.items()}


def few(rows: Any) -> list[Row]:
    """Take the first rows: `ROWS` of them, or as many as have `TOKENS` together."""
    selection: list[Row] = []
    total = 0
    endless = isinstance(rows, IterableDataset | Iterator)
    for row in islice(rows, ROWS) if endless else (rows[i] for i in range(min(ROWS, len(rows)))):
        total += len(row["input_ids"])
        if len(selection) >= 2 and total > TOKENS:
            break
        selection.append(row)
    return selection


@torch.no_grad()
def memory_gain(
    model: MemoryModelForCausalLM, rows: list[Row], *, progress: bool = False
) -> dict[str, float | int]:
    """Measure how much better rows are predicted with the memory than with it off, behind their
    first segment.

    Args:
        model: trained.
        rows: `input_ids (T,)` and, where not all of them are predicted, `labels (T,)`.
        progress: show a bar.

    Returns:
        `memory_on`, `memory_off`: nats per token; `memory_gain`, their mean difference by rows, and
        `memory_gain_error`, its standard error; `held_out_rows`. Empty where fewer than two rows
        go beyond a segment.
    """
    was_training = model.training
    model.eval()
    losses: list[tuple[float, float]] = []
    size = model.segment_size
    try:
        for row in tqdm(rows, desc="held-out", unit="row", disable=not progress):
            ids = row["input_ids"][None].to(model.device)
            labels = row.get("labels", row["input_ids"]).clone()[None].to(model.device)
            labels[:, : size + 1] = IGNORED
            if not bool((labels != IGNORED).any()):
                continue
            on, off = (
                model(
                    ids, labels=labels, memory_control=control, use_cache=False,
                    return_logits=False, output_router_logits=False,
                ).loss
                for control in (None, "off")
            )  # fmt: skip
            losses.append((float(on), float(off)))
    finally:
        model.train(was_training)
    if len(losses) < 2:
        return {}
    pairs = torch.tensor(losses, dtype=torch.float64)
    gains = pairs[:, 1] - pairs[:, 0]
    return {
        "memory_on": float(pairs[:, 0].mean()),
        "memory_off": float(pairs[:, 1].mean()),
        "memory_gain": float(gains.mean()),
        "memory_gain_error": float(gains.std() / len(gains) ** 0.5),
        "held_out_rows": len(losses),
    }


def gain_in_words(about: dict[str, Any]) -> tuple[str, str | None]:
    """Say what `memory_gain` measured, or why nothing was, and warn if the memory does not help;
    both may be empty."""
    if about.get("held_out_rows") == 0:
        return (
            "held-out: not measured: of fewer than 40 rows none is kept from training, and two "
            "must go beyond a segment. Give more text or a `data.eval_split`, or see what "
            "`memwrap eval` says on text that was not trained on."
        ), None
    if "memory_gain" not in about:
        return "", None
    gain, error = about["memory_gain"], about["memory_gain_error"]
    text = (
        f"held-out: {about['memory_on']:.4f} nats with the memory, {about['memory_off']:.4f} with "
        f"it off: {gain:+.4f} +- {error:.4f} ({about['held_out_rows']} rows)"
    )
    if gain > 2 * error:
        return text, None
    worse = "is worse than" if gain < -2 * error else "makes no difference from"
    return text, (
        f"warning: reading with this memory {worse} reading without it. Train longer, with a lower "
        "trainer.memory_learning_rate, or on text in which later segments need earlier ones."
    )


__all__ = ["few", "gain_in_words", "held_back", "memory_gain", "task_rows"]
