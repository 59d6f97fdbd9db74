"""What users and other libraries change at a wrapped model: casts, checkpointing, training."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memwrap.backbones.backbone import memory_dtype
from memwrap.backbones.expert_balance import OPTION, ExpertBalance, find_balance
from memwrap.engine.inputs import refuse_routers
from memwrap.model.adapter_switches import adapter_keys, adapter_layers


def follow_casts(model: Any) -> None:
    """Tell the memories the backbone's dtype, where it was cast after wrapping.

    Raises:
        ValueError: if the backbone alone was cast to or from float64.
    """
    dtype, wide = model.parts.embedding_weight.dtype, memory_dtype(model.backbone)
    for memory in model.memories.values():
        sizes = memory.sizes
        if (sizes.backbone_dtype, sizes.dtype) == (dtype, wide):
            continue
        param_dtype = next((p.dtype for p in memory.parameters() if p.is_floating_point()), wide)
        if torch.float64 in (param_dtype, wide) and param_dtype != wide:
            raise ValueError(
                f"The backbone was cast to {dtype}, its memory is {param_dtype}: "
                f"cast the whole model (model.to({dtype}))."
            )
        memory.sizes = replace(sizes, backbone_dtype=dtype, dtype=wide)


def take_over_checkpointing(backbone: nn.Module) -> bool:
    """Turn the layers' own checkpointing off, which would drop the open segment; say whether it
    was on."""
    was_on = False
    for module in backbone.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing, was_on = False, True  # type: ignore[assignment]
    return was_on


def balance_of(model: Any, asked: bool | None, learning: bool) -> ExpertBalance | None:
    """Find the loss that balances a backbone's experts, where it is asked for: in the call or, as
    transformers does it, in the backbone's config; only where the call computes a loss.

    Raises:
        ValueError: if the call asks and computes no loss, or the backbone has none.
    """
    if asked and not learning:
        refuse_routers()
    wanted = _asks_for_balance(model) if asked is None else asked
    balance = find_balance(model.backbone) if wanted and learning else None
    if asked and balance is None:
        raise ValueError(
            f"`{OPTION}` asks for the loss that balances experts, which "
            f"{type(model.backbone).__name__} does not have as others do; leave it out."
        )
    if asked is None and balance is None:
        warn_of_balance(model)
    return balance


def _asks_for_balance(model: Any) -> bool:
    return bool(getattr(model.parts.config, OPTION, False))


def warn_of_balance(model: Any) -> None:
    """Warn where a backbone is trained by a loss without the part that balances its experts, which
    its config asks for."""
    missed = model.training and torch.is_grad_enabled() and _asks_for_balance(model)
    if missed and any(p.requires_grad for p in model.backbone.parameters()):
        warnings.warn(
            f"`{OPTION}` is set in the backbone's config, but what is computed here is without "
            "the loss that balances experts: the model's own loss (of labels) has it.",
            stacklevel=3,
        )


def warn_of_training(model: Any) -> None:
    """Warn of a memory that a PEFT model around this one froze, and training leaves out."""
    if not torch.is_grad_enabled():
        return
    if "peft_config" not in model.__dict__:
        return
    memory = []
    for module in model.memories.values():
        put = adapter_keys(module)  # by PEFT, into the memory itself
        memory += [p for name, p in module.named_parameters() if name not in put]
    if not memory or any(p.requires_grad for p in memory):
        return
    adapted = (p for _, layer in adapter_layers(model.backbone) for p in layer.parameters())
    if any(p.requires_grad for p in adapted):
        warnings.warn(
            "The adapters are trained, but every parameter of the memory is frozen and would not "
            "be saved with them: give the PEFT config modules_to_save=['memory_modules'] "
            "(get_peft_model, SFTTrainer's peft_config), or use model.add_lora instead.",
            stacklevel=3,
        )
