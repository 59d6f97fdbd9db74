"""The matrices of linear layers, for operations that fold them into others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def matrix_of(layer: Any) -> Tensor:
    """Compute the matrix `(out, in)` by which a linear layer without a bias multiplies.

    The weight of a layer that PEFT put an adapter around is that of the layer alone. What both
    make of the unit vectors is the matrix of the two.
    """
    weight: Tensor = layer.weight
    if isinstance(layer, nn.Linear):
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return layer(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T


__all__ = ["matrix_of"]
