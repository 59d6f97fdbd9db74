"""Gradients averaged over processes, where DDP's own reduction stays off."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 2**23
"""Gradient elements that are reduced in one call."""


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over all processes, as DDP does.

    A parameter that some process used counts as zero where it was not used; one that nobody
    used keeps no gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    used = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    size = 0
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if not is_used:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        first = bucket[0] if bucket else parameter.grad
        alike = first.dtype == parameter.grad.dtype and first.device == parameter.grad.device
        if not alike or size >= _BUCKET:
            _average(bucket)
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
    _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    # Divided first, as DDP does: the sum of fp16 gradients may overflow.
    flat /= dist.get_world_size()
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


__all__ = ["average_gradients"]
