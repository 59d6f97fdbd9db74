"""Distillation: the backbone as it was says what the model with a memory is to follow."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.backbones.adapters import lora_disabled
from memwrap.engine.inputs import Teacher
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.training.batches import Batch, shape_of


@torch.no_grad()
def teacher_of(
    model: MemoryModelForCausalLM, batch: Batch, weight: float, temperature: float,
    labels: float = 1.0,
) -> Teacher:  # fmt: skip
    """Run the backbone without adapters and memories, over whole rows of a batch.

    A linearized model's backbone has its own softmax there.

    Args:
        model: the model that is trained.
        batch: `input_ids (B, T)` or `inputs_embeds`, and their mask.
        weight, temperature, labels: see `Teacher`.

    Raises:
        ValueError: for rows that the backbone's context does not hold.
    """
    limit = model.parts.config.max_position_embeddings
    columns = shape_of(batch)[1]
    if columns > limit:
        raise ValueError(
            f"Distillation needs rows that fit into the backbone's context of {limit} tokens; one "
            f"has {columns}. Cut documents shorter (data.max_tokens) or set the weight to 0."
        )
    training = [module for module in model.backbone.modules() if module.training]
    model.backbone.eval()
    try:
        with lora_disabled(model.backbone):
            names = ("input_ids", "inputs_embeds", "attention_mask")
            given = {name: batch[name] for name in names if batch.get(name) is not None}
            hidden: Tensor = model.parts.decoder(**given, use_cache=False).last_hidden_state
    finally:
        for module in training:
            module.training = True
    return Teacher(hidden, weight, temperature, labels)


__all__ = ["teacher_of"]
