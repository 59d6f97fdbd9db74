"""Feature maps of linear attention: what takes the place of the softmax over tokens.

Shapes: `(..., D)` to `(..., F)`. Computed in the accumulation dtype.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.ops import accumulation_dtype
from memwrap.ops.infini.chunked import phi

FeatureMap = Literal["softmax", "elu", "hedgehog", "taylor", "none"]
FEATURE_MAPS: tuple[FeatureMap, ...] = get_args(FeatureMap)
SAME_WIDTH = ("softmax", "elu", "none")


def features(x: Tensor, kind: str) -> Tensor:
    """Compute features of queries or keys `(..., D)`.

    Args:
        x: raw queries or keys.
        kind: `"softmax"` over the channels; `"elu"`, ELU + 1; `"hedgehog"`, softmax of x and of
            -x side by side (Zhang et al. 2024, without its learned matrix); `"taylor"`, the
            second-order expansion of `exp(q k / sqrt(D))` (Arora et al. 2024, "Based");
            `"none"`, x itself.

    Returns:
        `(..., F)`, F as in `feature_width`.
    """
    if kind == "elu":
        return phi(x)
    x = x.to(accumulation_dtype(x))
    if kind == "softmax":
        return x.softmax(-1)
    if kind == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    return _taylor(x) if kind == "taylor" else x


def feature_width(kind: str, width: int) -> int:
    """Compute F for D = `width`."""
    if kind == "hedgehog":
        return 2 * width
    return 1 + width + width * (width + 1) // 2 if kind == "taylor" else width


def learned_features(x: Tensor, weight: Tensor) -> Tensor:
    """Compute Hedgehog's features with a learned matrix a head.

    Args:
        x: `(B, H, T, D)`.
        weight: `(H, D, F)`.

    Returns:
        `(B, H, T, 2 F)`: softmax of `x W` and of `-x W` side by side, each at least 1e-12, in
        weight's dtype.
    """
    projected = x.to(weight.dtype) @ weight
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1).clamp_min(1e-12)


def _taylor(x: Tensor) -> Tensor:
    """Compute `1, x, x_i x_j` so that the product of two is `1 + s + s^2 / 2`, s the scaled
    product."""
    width = x.shape[-1]
    x = x * width**-0.25
    first, second = torch.triu_indices(width, width, device=x.device)
    weight = torch.ones(len(first), dtype=x.dtype, device=x.device)
    weight = weight.masked_fill(first == second, math.sqrt(0.5))
    squares = x[..., first] * x[..., second] * weight
    return torch.cat([F.pad(x, (1, 0), value=1.0), squares], -1)
