"""Recall of past memory embeddings by cross attention (HMT)."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype
from memwrap.ops.buffers import filled


def recall(
    query: Tensor, cache: Tensor, count: Tensor, w_query: Tensor, w_key: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `softmax(S W_q^T (M W_k^T)^T / sqrt(d)) M` over the filled places of the cache M.

    The values are the cached rows themselves. Scores and their softmax are float32 (float64 for
    float64 inputs), the scale is the same in training and generation.

    Args:
        query: S, `(B, D)`.
        cache: M, `(B, N, D)`.
        count: `(B,)` filled places; a row with none recalls zeros.
        w_query, w_key: `(d, D)`.

    Returns:
        What is recalled `(B, D)` and the weights `(B, N)`, zero at places that are not filled.
    """
    dtype = accumulation_dtype(cache)
    with torch.autocast(cache.device.type, enabled=False):
        q = query.to(dtype) @ w_query.to(dtype).T
        k = cache.to(dtype) @ w_key.to(dtype).T
        scores = (k @ q[..., None]).squeeze(-1) / w_query.shape[0] ** 0.5
        there = filled(count, cache.shape[1])
        # The least finite number, not -inf: a row without any entry would be NaN.
        scores = scores.masked_fill(~there, torch.finfo(dtype).min)
        weights = scores.softmax(-1) * there
        return (weights[:, None] @ cache.to(dtype)).squeeze(1), weights
