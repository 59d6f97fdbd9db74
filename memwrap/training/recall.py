"""Training data of the associative recall tasks."""

from __future__ import annotations

from typing import Any

from memwrap.tasks.associative import AssociativeDataset, AssociativeTask
from memwrap.training.arguments import parse_curriculum
from memwrap.training.collating import DocumentCollator
from memwrap.training.recipe import Recipe


def recall_tasks(section: Any, vocab_size: int) -> list[AssociativeTask]:
    """Return the tasks of a recipe's `recall` section.

    Raises:
        ValueError: for ids that the vocabulary does not have.
    """
    ids = section.ids or AssociativeTask.last_ids(vocab_size)
    if max(ids) >= vocab_size:
        raise ValueError(f"`recall.ids` has {max(ids)}; the vocabulary ends at {vocab_size - 1}.")
    return [
        AssociativeTask.of_ids(
            ids,
            key_size=section.key_size,
            value_size=section.value_size,
            num_pairs=section.num_pairs,
            rewrite=name == "rewrite",
        )
        for name in section.tasks
    ]


def recall_data(
    recipe: Recipe, vocab_size: int, seed: int | None = None
) -> tuple[AssociativeDataset, DocumentCollator]:
    """Make endless training rows of a recipe's recall tasks, and the collator of their batches;
    `seed` instead of the recipe's.

    Raises:
        ValueError: if the recipe has no `recall` section.
    """
    section = recipe.recall
    if section is None:
        raise ValueError("`recall` is missing; a 'recall' recipe needs it.")
    dataset = AssociativeDataset(
        recall_tasks(section, vocab_size),
        batch_size=recipe.trainer.batch_size,
        min_pairs=section.min_pairs,
        max_pairs=section.num_pairs,
        num_queries=section.num_queries,
        seed=recipe.trainer.seed if seed is None else seed,
        curriculum=parse_curriculum(section.curriculum) if section.curriculum else None,
    )
    return dataset, DocumentCollator(0)
