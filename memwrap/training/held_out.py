"""Whether training made the memory worth reading: held-out rows with it, and with it off."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memwrap.engine.inputs import check_inputs
from memwrap.memories.protocol import InsertsTokens, LogitsMemory
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.tasks import task
from memwrap.training.batches import IGNORED

ROWS, TOKENS = 16, 8192
"""Rows that are read, and the most tokens of all together (but at least two rows)."""
TOGETHER = 1024
"""Tokens that are read in one batch, of rows that are shorter; padding counts."""
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
    pairs = [(row["input_ids"], row.get("labels", row["input_ids"]).clone()) for row in rows]
    for _, labels in pairs:
        labels[: size + 1] = IGNORED
    judged = [(ids, labels) for ids, labels in pairs if bool((labels != IGNORED).any())]
    try:
        with tqdm(total=len(judged), desc="held-out", unit="row", disable=not progress) as bar:
            for part in _batches(model, judged):
                on, off = (_losses(model, part, control) for control in (None, "off"))
                losses += zip(on, off, strict=True)
                bar.update(len(part))
    finally:
        model.train(was_training)
    if len(losses) < 2:
        return {}
    values = torch.tensor(losses, dtype=torch.float64)
    gains = values[:, 1] - values[:, 0]
    return {
        "memory_on": float(values[:, 0].mean()),
        "memory_off": float(values[:, 1].mean()),
        "memory_gain": float(gains.mean()),
        "memory_gain_error": float(gains.std() / len(gains) ** 0.5),
        "held_out_rows": len(losses),
    }


def _batches(
    model: MemoryModelForCausalLM, rows: list[tuple[Tensor, Tensor]]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Group rows of ids and labels that are read together, of a few tokens in all; one at a time
    where a memory takes part in the logits, or inserts tokens, which are targets too."""
    memories = model.memories.values()
    alone = any(isinstance(memory, LogitsMemory | InsertsTokens) for memory in memories)
    batches: list[list[tuple[Tensor, Tensor]]] = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batches and not alone and (len(batches[-1]) + 1) * len(row[0]) <= TOGETHER:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _losses(
    model: MemoryModelForCausalLM, rows: list[tuple[Tensor, Tensor]], control: str | None
) -> list[float]:
    """Compute the mean loss of each row's targets."""
    if len(rows) == 1:
        ids, labels = (x[None].to(model.device) for x in rows[0])
        return [float(model(
            ids, labels=labels, memory_control=control, use_cache=False, return_logits=False,
            output_router_logits=False,
        ).loss)]  # fmt: skip
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
    inputs = check_inputs(ids, None, mask.to(model.device))
    state = model.new_state(len(rows))
    hidden = model.loop()(inputs, state, hidden_from=0, keep_open=False, control=control).hidden
    means = []
    for row, (_, labels) in zip(hidden, rows, strict=True):  # type: ignore[arg-type]
        places = (labels[1:] != IGNORED).nonzero()[:, 0]
        logits = model._logits(row[None, places.to(row.device)], 0)[0]
        targets = labels[1:][places].to(logits.device)
        means.append(float(cross_entropy(logits.float(), targets)))
    return means


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
