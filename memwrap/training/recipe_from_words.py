"""A recipe without a file: `memwrap train --model DIR --data FOLDER --memory armt`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from memwrap.io.reading import read_json
from memwrap.memories.registry import config_class
from memwrap.model.base_loading import base_place, find_folder
from memwrap.model.configuration import MemoryModelConfig
from memwrap.model.opening import is_memory_model
from memwrap.training.recipe import Recipe, load_recipe, resolve

_SEGMENTS = 8
"""Segments of a document that are read at once; gradients flow through half of them."""


def recipe_of(
    words: list[str], model: str | None, data: str | None, memory: str | None, output: Path | None
) -> Recipe:
    """Make the recipe that a command line asks for: a file or name in front of `words`, whose
    model, data and output the other ones replace; without it as `recipe_from_words`.

    Raises:
        ValueError: for what is missing or does not go together, and as `load_recipe`.
    """
    if words and "=" not in words[0]:
        if memory is not None:
            raise ValueError("A recipe names its memory; --memory goes with --model and --data.")
        given = {"model.name": model, "data.source": data, "output": output}
        extra = [f"{key}={value}" for key, value in given.items() if value is not None]
        return load_recipe(words[0], [*words[1:], *extra])
    if model is None:
        raise ValueError("Give the name of a recipe, or --model with --data and --memory.")
    return recipe_from_words(model, data, memory, output, words)


def recipe_from_words(
    model: str,
    data: str | None,
    memory: str | None,
    output: Path | None = None,
    words: list[str] | None = None,
) -> Recipe:
    """Make the recipe that fine-tunes a memory, and LoRA in the backbone, on documents.

    Args:
        model: what is trained: any causal LM with `memory`, or a saved memwrap model.
        data: documents, as `data.source` of a recipe.
        memory: its name; None to go on training a saved memwrap model.
        output: folder to write; by default made of the names, in `runs`.
        words: `KEY=VALUE` settings of the memory, and of the recipe by their full keys
            (`trainer.steps=100`).

    Raises:
        ValueError: for what is missing or does not go together, and as `load_recipe`.
    """
    if data is None:
        raise ValueError("Give the documents to train on: --data FOLDER (or --data stdlib).")
    words = words or []
    has_memory = is_memory_model(model)
    if has_memory == (memory is not None):
        raise ValueError(
            f"{model} has a memory of its own; leave --memory out." if has_memory
            else f"{model} is a model without memory; give --memory NAME (`memwrap list`)."
        )  # fmt: skip
    start: dict[str, Any] = _of_saved(model) if has_memory else {"model": {"name": model}}
    if memory is not None:
        chosen = config_class(memory).on_pretrained()
        start["memory"] = {"name": memory, "bptt_segments": _SEGMENTS // 2, **chosen}
    fields = start["memory"]
    overrides = [full_key(word) for word in words]
    size = _segment_size(fields, overrides)
    values = {
        "task": "finetune",
        "output": str(output or Path("runs") / f"{fields['name']}_{Path(model).name}"),
        "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"},
        **start,
        "data": {
            "source": data, "split": "train" if data == "stdlib" else None, "join_short": True,
            "max_tokens": _SEGMENTS * size, "min_tokens": 2 * size,
        },
        "trainer": {
            "steps": 1000, "accumulation": 1, "learning_rate": 1e-4, "memory_learning_rate": 1e-3,
            "warmup_steps": 5, "schedule": "constant_with_warmup", "save_every": 200,
            "log_every": 5,
        },
    }  # fmt: skip
    recipe = resolve(values, Path("the command line"), overrides)
    recipe.options = ["--model", model, "--data", data]
    recipe.options += ["--memory", memory] if memory is not None else []
    recipe.options += ["-o", str(output)] if output is not None else []
    return recipe


def full_key(word: str) -> str:
    """Give a bare key its section: it is a setting of the memory, unless a recipe has it."""
    key = word.partition("=")[0]
    return word if "." in key or key in Recipe.types() else f"memory.{word}"


def _segment_size(fields: dict[str, Any], overrides: list[str]) -> int:
    size = fields.get("segment_size", config_class(fields["name"])().segment_size)
    for word in overrides:
        match = re.fullmatch(r"memory\.segment_size=(\d+)", word)
        size = int(match[1]) if match else size
    return max(1, size)


def _of_saved(model: str) -> dict[str, Any]:
    """Read from a saved model what it was trained with, to start from its weights."""
    folder = find_folder(model)
    config = MemoryModelConfig.from_dict(read_json(folder / "config.json"))
    if len(config.memories or []) != 1 or config.base_included:
        raise ValueError(
            f"{folder} holds several memories or its base's weights; train it with MemoryTrainer."
        )
    recipe: dict[str, Any] = {
        "model": {"name": str(base_place(config, folder))}, "memory": dict(config.memories[0]),  # type: ignore[index]
        "init_from": str(folder), "lora": None,
    }  # fmt: skip
    for adapter in (config.adapters or {}).values():
        recipe["lora"] = {
            "r": adapter["r"], "alpha": adapter["lora_alpha"],
            "target_modules": adapter["target_modules"],
        }  # fmt: skip
    return recipe


__all__ = ["recipe_from_words", "recipe_of"]
