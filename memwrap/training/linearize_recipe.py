"""The recipe behind `memwrap linearize`: a conversion in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memwrap.memories.registry import config_class, memory_class
from memwrap.training.recipe import Recipe, resolve
from memwrap.training.recipe_from_words import full_key

LENGTH = 512
"""Tokens of a segment, and of the rows of the first two stages."""
STAGES: dict[str, dict[str, Any]] = {
    "mixers": {
        "trainer": {
            "steps": 200, "mixer_matching": True, "memory_learning_rate": 3e-3,
            "learning_rate": 1e-3,
        },
    },
    "logits": {
        "trainer": {
            "steps": 200, "distillation_weight": 1.0, "label_weight": 0.0,
            "memory_learning_rate": 3e-3, "learning_rate": 1e-3,
        },
    },
    "text": {
        "memory": {"bptt_segments": 1},
        "data": {"max_tokens": 4 * LENGTH, "min_tokens": 2 * LENGTH},
        "trainer": {
            "steps": 50, "batch_size": 1, "memory_learning_rate": 1e-3, "learning_rate": 5e-4,
        },
    },
}  # fmt: skip
"""What sets the stages apart: the layers' mixers, the base's distribution, long text."""


def linearize_recipe(
    model: str,
    memory: str,
    stages: list[str],
    data: str,
    output: Path,
    words: list[str] | None = None,
) -> Recipe:
    """Make the recipe of a conversion.

    Args:
        model: a causal LM of transformers.
        memory: the name of one that takes the place of the attention.
        stages: among `STAGES`, in their order.
        data: documents, as `data.source` of a recipe.
        output: folder to write.
        words: `KEY=VALUE` settings of the memory (`layers=auto` measures which layers keep their
            softmax, `keep=8` says how many) and of the recipe by full keys
            (`stages.text.trainer.steps=100`).

    Raises:
        ValueError: for a memory that leaves attention as it is, unknown stages, and as
            `load_recipe`.
    """
    config = config_class(memory)
    if not memory_class(memory).claims.linearizes:
        raise ValueError(
            f"The memory {memory!r} stands beside the attention; `memwrap train` trains it. "
            "linearize takes one that replaces it, such as 'liger'."
        )
    if not stages or stages != [name for name in STAGES if name in stages]:
        raise ValueError(
            f"`--stages` is {','.join(stages)!r}; give some of {','.join(STAGES)}, in this order."
        )
    words = list(words or [])
    for word in words:
        section, _, rest = word.partition(".")
        if section == "stages" and rest.partition(".")[0] not in stages:
            raise ValueError(f"{word!r} sets a stage that is not run; --stages {','.join(stages)}.")
    keep = next((w.partition("=")[2] for w in words if w.startswith("keep=")), None)
    automatic = "layers=auto" in words
    if keep is not None and not automatic:
        raise ValueError(f"`keep` is {keep}, which needs layers=auto.")
    overrides = [full_key(w) for w in words if w != "layers=auto" and not w.startswith("keep=")]
    overrides += [f"layer_choice.keep={keep}"] if keep else []
    given = config.on_pretrained()
    values: dict[str, Any] = {
        "task": "finetune",
        "output": str(output),
        "model": {"name": model, "dtype": "float32"},
        "memory": {"name": memory, "segment_size": LENGTH, **given},
        "lora": {
            "r": 16, "alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        "stages": {name: STAGES[name] for name in stages},
        "layer_choice": {"keep": 1} if automatic else None,
        "data": {
            "source": data, "split": "train" if data == "stdlib" else None, "join_short": True,
            "max_tokens": LENGTH, "min_tokens": LENGTH // 2,
        },
        "trainer": {
            "batch_size": 2, "warmup_steps": 5, "schedule": "cosine", "save_every": 50,
            "log_every": 5, "adam_beta2": 0.95,
        },
    }  # fmt: skip
    recipe = resolve(values, Path("the command line"), overrides)
    recipe.verb = "linearize"
    recipe.options = [model, "--memory", memory, "--stages", ",".join(stages), "--data", data]
    recipe.options += ["--out", str(output), *(["layers=auto"] if automatic else [])]
    return recipe


__all__ = ["STAGES", "linearize_recipe"]
