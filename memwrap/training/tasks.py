"""Training data made by the tasks of the evaluation suite: the loss is on the answers alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from memwrap.tasks import task
from memwrap.tasks.base import FIRST_SEED
from memwrap.training.arguments import parse_curriculum
from memwrap.training.collating import DocumentCollator
from memwrap.training.recipe import Recipe


class TaskDataset(IterableDataset):
    """Endless rows `{input_ids, labels}` of tasks; a batch has one task and one length.

    Args:
        names: tasks, taken in turn, batch by batch.
        tokenizer: of the model.
        batch_size: rows of a batch.
        min_tokens, max_tokens: lengths are drawn from this range, batch by batch.
        curriculum: `(batch, tokens)`: the longest from that batch on.
        text_targets: tokens of a row's own text that are targets beside its answer.
        seed: of everything random.
    """

    def __init__(
        self,
        names: list[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        min_tokens: int,
        max_tokens: int,
        curriculum: list[tuple[int, int]] | None = None,
        text_targets: int = 0,
        seed: int = 0,
    ) -> None:
        self.tasks = [task(name) for name in names]
        self.tokenizer, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.min_tokens, self.max_tokens = min_tokens, max_tokens
        self.curriculum, self.text_targets = curriculum or [(0, max_tokens)], text_targets

    def longest(self, batch: int) -> int:
        """Count the most tokens of a row in batch number `batch`."""
        reached = [tokens for first, tokens in self.curriculum if first <= batch]
        return max(self.min_tokens, min(self.max_tokens, reached[-1] if reached else 0))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        draw = random.Random(self.seed)
        batch = 0
        while True:
            chosen = self.tasks[batch % len(self.tasks)]
            length = draw.randint(self.min_tokens, self.longest(batch))
            for _ in range(self.batch_size):
                seed = FIRST_SEED + draw.getrandbits(40)
                sample = chosen.sample(self.tokenizer, length, seed)
                row = sample.training_row(self.tokenizer.eos_token_id if chosen.ends else None)
                text = [at for at, label in enumerate(row["labels"]) if at and label == -100]
                for at in draw.sample(text, min(self.text_targets, len(text))):
                    row["labels"][at] = row["input_ids"][at]
                yield {name: torch.tensor(values) for name, values in row.items()}
            batch += 1


def tasks_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[TaskDataset, DocumentCollator]:
    """Make endless training rows of a recipe's tasks, and the collator of their batches.

    Raises:
        ValueError: if the recipe has no `tasks` section, or a task does not fit its lengths.
    """
    section = recipe.tasks
    if section is None:
        raise ValueError("`tasks` is missing; a 'tasks' recipe needs it.")
    dataset = TaskDataset(
        section.names,
        tokenizer,
        batch_size=recipe.trainer.batch_size,
        min_tokens=section.min_tokens,
        max_tokens=section.max_tokens,
        curriculum=parse_curriculum(section.curriculum) if section.curriculum else None,
        text_targets=section.text_targets,
        seed=recipe.trainer.seed,
    )
    for made in dataset.tasks:
        try:
            made.sample(tokenizer, section.min_tokens, 0)
        except ValueError as error:
            raise ValueError(f"`tasks.min_tokens` {section.min_tokens}: {error}") from error
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return dataset, DocumentCollator(pad)
