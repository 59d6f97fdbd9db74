"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.retrieve`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend
from memwrap.ops.retrieve.chunked import attend_chunked, search_chunked
from memwrap.ops.retrieve.naive import attend_naive, search_naive

SIMILARITIES = ("dot", "cosine", "l2")


@dataclass(frozen=True)
class Read:
    """The result of queries to a cache.

    Attributes:
        out: `(B, H, T, Dv)`, the weighted mean of the retrieved values; 0 where there are none.
        logsumexp: `(B, H, T)` of the retrieved scores; -inf where there are none.
        index: `(B, H, T, k)` entries, best first; -1 where there are fewer or one is left out.
        weights: `(B, H, T, k)`, sums to 1 (to 0 where there are none).
    """

    out: Tensor
    logsumexp: Tensor
    index: Tensor
    weights: Tensor


@torch.no_grad()
def search(
    query: Tensor, keys: Tensor, valid: Tensor, top_k: int, *, similarity: str = "dot"
) -> tuple[Tensor, Tensor]:
    """Find the most similar entries, exactly.

    Queries x entries are never held at once: entries are looked through in chunks, of which the
    best are kept. Similarities are computed in float32 (float64 for float64). Of equally
    similar entries those that come first are taken.

    Args:
        query: `(B, H, T, D)`.
        keys: `(B, Hkv, N, D)`.
        valid: `(B, N)` bool.
        top_k: most entries of each query.
        similarity: `"dot"` q.k, `"cosine"`, or `"l2"`, which is 2 q.k - |k|^2.

    Returns:
        Similarities `(B, H, T, k)`, descending, -inf where there are fewer valid entries, and
        their index `(B, H, T, k)`, -1 there.

    Raises:
        ValueError: for an unknown similarity.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"`similarity` is {similarity!r}; allowed: {', '.join(SIMILARITIES)}.")
    if current_backend() == "naive":
        result = search_naive(query, keys, valid, top_k, similarity)
    else:
        result = search_chunked(query, keys, valid, top_k, similarity)
    return result[0], result[1].masked_fill(result[0] == -math.inf, -1)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor,
    top_k: int,
    *,
    scale: float | Tensor,
    similarity: str = "dot",
    threshold: float | None = None,
    softcap: float | None = None,
) -> Read:
    """Attend by softmax to each query's most similar entries alone.

    Args:
        query, keys, valid, top_k, similarity: as in `search`.
        values: `(B, Hkv, N, Dv)`.
        scale: of the scores q.k, one number or `(H,)`.
        threshold: entries that are no more similar than this are left out.
        softcap: scores s become `softcap * tanh(s / softcap)`.
    """
    scores, index = search(query, keys, valid, top_k, similarity=similarity)
    if threshold is not None:
        index = index.masked_fill(scores <= threshold, -1)
    return attend_to(query, keys, values, index, scale=scale, softcap=softcap)


def attend_to(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    *,
    scale: float | Tensor,
    softcap: float | None = None,
) -> Read:
    """Attend as `attend` does, to entries chosen before: `index` `(B, H, T, k)`, -1 for none."""
    wide = accumulation_dtype(query)
    scales = torch.as_tensor(scale, dtype=wide, device=query.device).expand(query.shape[1])
    if index.shape[-1] == 0:
        out = query.new_zeros(*query.shape[:3], values.shape[-1], dtype=wide)
        weights = out.new_zeros(index.shape)
        return Read(out, out.new_full(query.shape[:3], -math.inf), index, weights)
    function = attend_naive if current_backend() == "naive" else attend_chunked
    out, logsumexp, weights = function(query, keys, values, index, scales, softcap)
    return Read(out, logsumexp, index, weights)
