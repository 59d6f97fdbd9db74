"""Search of a cache of memory embeddings by cross attention (HMT)."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype
from memwrap.ops.buffers import filled


def search_cache(
    query: Tensor, cache: Tensor, count: Tensor, w_query: Tensor, w_key: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `softmax(S W_q^T (M W_k^T)^T / sqrt(d)) M` over the full places of the cache M.

    The values are the cached rows themselves. Scores and their softmax are float32 (float64 for
    float64 inputs), the scale is the same in training and generation.

    Args:
        query: S, `(B, D)`.
        cache: M, `(B, N, D)`.
        count: `(B,)` full places; a row with none finds zeros.
        w_query, w_key: `(d, D)`.

    Returns:
        What was found `(B, D)` and the weights `(B, N)`, zero at places that are not full.
    """
    dtype = accumulation_dtype(cache)
    with torch.autocast(cache.device.type, enabled=False):
        q = query.to(dtype) @ w_query.to(dtype).T
        k = cache.to(dtype) @ w_key.to(dtype).T
        scores = (k @ q[..., None]).squeeze(-1) / w_query.shape[0] ** 0.5
        full = filled(count, cache.shape[1])
        # The least finite number, not -inf: a row without any entry would be NaN.
        scores = scores.masked_fill(~full, torch.finfo(dtype).min)
        weights = scores.softmax(-1) * full
        return (weights[:, None] @ cache.to(dtype)).squeeze(1), weights
