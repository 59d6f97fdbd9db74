"""Groups of a memory's parameters, for an optimizer."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn

from memwrap.training.arguments import MemoryTrainingArguments


def memory_groups(
    memory_model: Any, model: nn.Module, args: MemoryTrainingArguments, decayed: Set[str]
) -> list[dict[str, Any]]:
    """Make parameter groups of the memory; empty if nothing sets it apart from the rest.

    Args:
        memory_model: the memwrap model itself.
        model: the same with PEFT around it, if there is any.
        args: its rates and decays.
        decayed: names of the parameters of `model` that get weight decay.
    """
    rate = args.learning_rate if args.memory_learning_rate is None else args.memory_learning_rate
    decay = args.weight_decay if args.memory_weight_decay is None else args.memory_weight_decay
    groups: list[dict[str, Any]] = []
    for memory in memory_model.memories.values():
        for group in memory.optimizer_groups() if hasattr(memory, "optimizer_groups") else []:
            params = [p for p in group["params"] if p.requires_grad]
            if params:
                new = {"lr": rate, "weight_decay": decay, **group, "params": params}
                new["lr"] *= new.pop("lr_scale", 1.0)
                groups.append(new)
    if not groups and args.memory_learning_rate is None and args.memory_weight_decay is None:
        return []
    taken = {id(p) for group in groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    rest: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in memory_model.memory_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            rest[names.get(id(parameter)) in decayed].append(parameter)
    for decays, params in rest.items():
        if params:
            groups.append({"params": params, "lr": rate, "weight_decay": decay if decays else 0.0})
    return groups


__all__ = ["memory_groups"]
