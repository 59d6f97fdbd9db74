"""What the first stage of a conversion needs of a model."""

from __future__ import annotations

from typing import Any

from memwrap.training.arguments import MemoryTrainingArguments


def check_mixer_matching(model: Any, args: MemoryTrainingArguments) -> None:
    """Refuse `mixer_matching` where there is nothing to match, or the teacher would move.

    Raises:
        ValueError: says which.
    """
    if not args.mixer_matching:
        return
    if not any(memory.claims.linearizes for memory in model.memories.values()):
        raise ValueError(
            "`mixer_matching` compares attention with what takes its place, and "
            f"{', '.join(model.memories)} does not; use liger, lolcats or ahn, or set it to false."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    memory = {id(p) for p in model.memory_parameters()}
    if any(id(p) not in adapters | memory for p in trained):
        raise ValueError(
            "`mixer_matching` trains the memory and adapters, and the backbone, which is the "
            "teacher, would move; set train_backbone=false."
        )
    if not trained:
        raise ValueError(
            "`mixer_matching` has nothing to train: this memory has no parameters; add `lora`."
        )
