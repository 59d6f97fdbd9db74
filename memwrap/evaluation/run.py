"""Evaluations as `memwrap eval` runs them: what is measured on what, and where it is written."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memwrap.data.documents import Document, load_documents, long_documents
from memwrap.evaluation.controls import CURVES, FULL, SHUFFLED, SINKS, WINDOW, own_context
from memwrap.evaluation.conversations import (
    READERS,
    ConversationsResult,
    evaluate_conversations,
)
from memwrap.evaluation.perplexity import BRANCH, PerplexityResult, perplexity_by_position
from memwrap.evaluation.plots import plot_conversations, plot_perplexity, plot_recall
from memwrap.evaluation.recall import RecallResult, evaluate_recall
from memwrap.evaluation.report import write_report
from memwrap.evaluation.suite import SuiteResult, evaluate_tasks
from memwrap.io.atomic_files import write_text
from memwrap.model.building import sizes_of
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.tasks import available
from memwrap.training.recall import recall_tasks
from memwrap.training.recipe import load_recipe

TASKS = ("perplexity", "recall", "conversations", "linear-usage", "head-budgets")
Results = (
    dict[str, PerplexityResult]
    | dict[str, RecallResult]
    | dict[str, SuiteResult]
    | dict[str, ConversationsResult]
)


def suite_tasks(names: str, passes: int = 1) -> list[str]:
    """List the tasks of the suite in a comma-separated list; none for the names in `TASKS`.

    Raises:
        ValueError: for an unknown name, or more than one of the `passes` where texts are read once.
    """
    if passes != 1 and names in TASKS and names != "recall":
        raise ValueError(f"`passes` is {passes}; {names} reads its texts once.")
    if names in TASKS:
        return []
    tasks = [name.strip() for name in names.split(",")]
    unknown = [name for name in tasks if name not in available()]
    if unknown:
        known = [*TASKS, *available()]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"There is no task {unknown[0]!r}.{hint} `memwrap eval --help` says how to list them; "
            f"some are {', '.join(TASKS)}, passkey, told_facts."
        )
    return tasks


def tasks(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    lengths: str,
    samples: int,
    name: str,
    passes: int = 1,
) -> dict[str, SuiteResult]:
    """Evaluate tasks of the suite at lengths given as "1024,4096", beside their controls.

    Raises:
        ValueError: for a length that is no number, or that a task does not fit in.
    """
    sizes = _numbers(lengths, "lengths", "1024,4096")
    controls = tuple(c for c in CURVES[1:] if c != WINDOW or _windowed(model))
    return {
        "tasks": evaluate_tasks(
            model, tokenizer, names, sizes, samples=samples, controls=controls, passes=passes,
            name=name,
        )
    }  # fmt: skip


def conversations(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    turns: str,
    dialogues: int,
    name: str,
) -> dict[str, ConversationsResult]:
    """Hold conversations of as many turns as given, "16,64", and ask what is known of them.

    Raises:
        ValueError: for turns that are no numbers, or too few.
    """
    counts = _numbers(turns, "turns", "16,64")
    readers = tuple(r for r in READERS if r != WINDOW or _windowed(model))
    return {
        "conversations": evaluate_conversations(
            model, tokenizer, counts, dialogues=dialogues, readers=readers, name=name
        )
    }


def check_numbers(lengths: str, turns: str) -> None:
    """Refuse options that are no numbers, before a model is loaded."""
    _numbers(lengths, "lengths", "1024,4096")
    _numbers(turns, "turns", "16,64")


def _numbers(text: str, name: str, example: str) -> list[int]:
    """Read the numbers of an option.

    Raises:
        ValueError: for what is none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"`{name}` is {text!r}; give numbers, as in {example}.") from None


def _windowed(model: MemoryModelForCausalLM) -> bool:
    """Tell whether the backbone's attention can meet a memory."""
    try:
        sizes_of(model.parts, attention=True)
    except ValueError:
        return False
    return True


def documents(
    source: str,
    split: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    loaded: list[Document] | None = None,
) -> list[Tensor]:
    """Give the ids `(tokens,)` of `count` long documents of a source, of which `loaded` are read
    already; shorter ones are joined.

    Raises:
        ValueError: if there is no document so long, or for a bad number.
    """
    if tokens < 2 or count < 1:
        raise ValueError(f"{count} documents of {tokens} tokens: at least 1 of at least 2.")
    loaded = load_documents(source, split) if loaded is None else loaded
    texts = long_documents(loaded, tokenizer, tokens)[:count]
    if not texts:
        raise ValueError(
            f"All documents of {source!r} ({split or 'all splits'}) together have fewer than "
            f"{tokens} tokens; ask for fewer tokens, or for another split."
        )
    encoded: list[Any] = [tokenizer(d.text, verbose=False)["input_ids"] for d in texts]
    return [torch.tensor(ids[:tokens]) for ids in encoded]


def perplexity(
    model: MemoryModelForCausalLM, rows: list[Tensor], base: dict | None = None
) -> dict[str, PerplexityResult]:
    """Measure perplexity by position beside its controls (without "shuffled" for a single document,
    and without window and sinks where a model's attention cannot meet a memory).

    `base` is as in `perplexity_by_position`."""
    controls = [c for c in CURVES[1:] if c != SHUFFLED or len(rows) > 1]
    if not _windowed(model):
        controls.remove(WINDOW)
    return {"perplexity": perplexity_by_position(model, rows, controls=tuple(controls), base=base)}


def linear_usage(model: MemoryModelForCausalLM, rows: list[Tensor]) -> dict[str, PerplexityResult]:
    """Measure what a window and the recurrence beside it are worth: both, each alone, and the base
    without training, over its full context and with a window of the same size and sinks.

    Raises:
        ValueError: for a model that has no such branches.
    """
    memories = [m for m in model.memories.values() if m.branches]
    if not memories:
        names = ", ".join(model.memories)
        raise ValueError(
            f"'linear-usage' is about a recurrence beside a window, as liger and ahn have; this "
            f"model has {names}. Use 'perplexity'."
        )
    size = getattr(memories[0].config, "window_size", 0)
    controls = [BRANCH + name for name in memories[0].branches if size or name != "window"]
    result = perplexity_by_position(
        model, rows, controls=(*controls, FULL, WINDOW), window=max(1, size) + SINKS,
        full_context_tokens=own_context(model),
    )  # fmt: skip
    return {"linear-usage": result}


def recall(
    model: MemoryModelForCausalLM, folder: Path, samples: int = 256, passes: int = 1
) -> dict[str, RecallResult]:
    """Recall by distance on the tasks of the model's recipe.

    Args:
        model: trained by a recall recipe.
        folder: where it is saved; holds `recipe.yaml`.
        samples: rows at each distance.
        passes: times that the pairs are read.

    Raises:
        ValueError: if the folder has no `recipe.yaml`, or that of another task.
    """
    path = folder / "recipe.yaml"
    recipe = load_recipe(path) if path.is_file() else None
    if recipe is None or recipe.recall is None:
        raise ValueError(
            f"{folder} has no recipe.yaml of a recall recipe (armt_recall_lora): only its models "
            "know what stands for keys and values."
        )
    results = {}
    for task in recall_tasks(recipe.recall, model.config.vocab_size):
        # Distinct keys end somewhere; keys that may come again do not.
        far = [d for d in (1, 2, 4, 8, 16, 32, 64) if task.rewrite or d <= task.num_keys]
        name = "rewrite" if task.rewrite else "remember"
        results[name] = evaluate_recall(
            model, task, distances=tuple(far), samples=samples, passes=passes
        )
    return results


def table(results: Results) -> str:
    """Write the tables of all results."""
    parts = []
    for name, result in results.items():
        if isinstance(result, PerplexityResult):
            texts = "1 text" if result.documents == 1 else f"{result.documents} texts"
            parts.append(f"nats a token, {texts} in segments of {result.segment_size} tokens")
        plain = isinstance(result, (PerplexityResult, SuiteResult, ConversationsResult))
        parts.append(result.table() if plain else f"{name}\n\n{result.table()}")
        if isinstance(result, PerplexityResult) and (warning := result.growth()):
            parts.append(warning)
    return "\n\n".join(parts)


def write(results: Results, folder: Path, title: str = "memwrap") -> list[Path]:
    """Write `KIND.json`, a report `KIND.html`, and of curves a plot `KIND.png`, into `folder`.

    Returns:
        Their paths.
    """
    kind = next((name for name in results if name in (*TASKS, "tasks")), "recall")
    values: Any = {name: result.to_dict() for name, result in results.items()}
    paths = [folder / f"{kind}.{ending}" for ending in ("json", "html", "png")]
    write_text(paths[0], json.dumps(values.get(kind, values), indent=2) + "\n")
    write_report({**results}, paths[1], title)
    recalls = {n: r for n, r in results.items() if isinstance(r, RecallResult)}
    if recalls:
        plot_recall(recalls, paths[2])
    for result in results.values():
        if isinstance(result, PerplexityResult):
            plot_perplexity(result, paths[2])
        if isinstance(result, ConversationsResult):
            plot_conversations(result, paths[2])
    return paths[:2] if kind == "tasks" else paths


__all__ = [
    "TASKS", "check_numbers", "conversations", "documents", "linear_usage", "perplexity", "recall",
    "suite_tasks", "table", "tasks", "write",
]  # fmt: skip
