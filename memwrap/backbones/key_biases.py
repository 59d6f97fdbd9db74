"""Biases of single keys, added to the scores that queries give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NOWHERE = -1000.0  # for a key that a head does not have: no infinity in a product


def bias_of_keys(parts: Sequence[tuple[int, Tensor | None]], keys: Tensor) -> Tensor:
    """Collect the biases of the first of all `keys` `(B, Hkv, K, D)`: how many keys each part has,
    and theirs `(B, Hkv, M)`, None for none; those behind have none either.

    Returns:
        `(B, Hkv, K)`, in float32 or float64.
    """
    batch, heads, total, _ = keys.shape
    dtype = torch.promote_types(keys.dtype, torch.float32)
    result = torch.zeros(batch, heads, total, dtype=dtype, device=keys.device)
    start = 0
    for count, bias in parts:
        stop = start + count
        if bias is not None:
            result[:, :, start:stop] = bias.clamp_min(NOWHERE)
        start = stop
    return result


def add_bias(
    queries: Tensor, keys: Tensor, mask: Any, bias: Tensor, scaling: float, cap: float | None
) -> tuple[Tensor, Tensor, Any]:
    """Let attention add a bias to the scores of keys.

    Channels of the keys hold it, which queries of ones read, so that the mask stays one for all
    heads. Under a soft cap they would be inside it; there the mask, which is added, holds it.

    Args:
        queries: `(B, H, T, D)`. keys: `(B, Hkv, K, D)`.
        mask: as the model's attention takes it (with a soft cap one that is added), or None.
        bias: `(B, Hkv, K)`.
        scaling: what attention multiplies products with.
        cap: the soft cap.

    Returns:
        Queries, keys and mask to attend with.
    """
    dtype = queries.dtype
    if cap is not None:
        groups = queries.shape[1] // keys.shape[1]
        return queries, keys, mask.to(bias) + bias.repeat_interleave(groups, 1)[:, :, None]
    score = (bias / scaling).clamp_min(torch.finfo(dtype).min / 2)
    parts = [score.to(dtype)]
    if bias.dtype != dtype:  # half types hold a score too coarsely: the rest has its own channel
        parts.append((score - parts[0].to(score)).to(dtype))
    spare = -(queries.shape[-1] + len(parts)) % 8 if queries.is_cuda else 0
    channels = torch.stack(parts + spare * [torch.zeros_like(parts[0])], -1)
    ones = queries.new_ones(*queries.shape[:3], channels.shape[-1])
    return torch.cat([queries, ones], -1), torch.cat([keys, channels], -1), mask
