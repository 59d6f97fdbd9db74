"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.landmark`."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import current_backend
from memwrap.ops.landmark.chunked import attention_chunked, retrieved_chunked
from memwrap.ops.landmark.naive import attention_naive, retrieved_naive


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    scaling: float | None = None,
    places: Tensor | None = None,
    landmark: Tensor | None = None,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend causally by the grouped softmax over blocks that lie one behind the other.

    With section `s(j) = j // (m + 1)` of the key at place j, c that of the query, S the tokens of
    section c that the query sees, l_s the landmark and N_s the tokens of section s < c:

        Z = sum_S exp(x_j) + sum_{s < c} exp(x_{l_s})
        p_j = exp(x_j) / Z on S,  exp(x_{l_s}) / Z * softmax(x over N_s)_j on N_s,  0 on landmarks

    Args:
        q: `(B, H, T, Dk)`, rotated.
        k, v: `(B, Hkv, K, Dk)` and `(B, Hkv, K, Dv)`, the key at place j in row j; landmarks are
            the rows j with `j % (m + 1) == m`. K need not fill a block.
        block_size: m, tokens of a block without its landmark.
        scaling: of the scores (default `Dk ** -0.5`).
        places: `(B, T)` of the queries; default: the last T of K.
        landmark: `(B, T)` bool, queries that are landmarks: they do not see their own key. Default:
            by place. One that closes a partial block has to be said.
        valid: `(B, K)` bool; False is padding. An earlier block of nothing but padding has no
            share, whatever its landmark is.
        documents: `(B, N)`, the document of each block: a query sees blocks of its own one.
        softcap: scores x become `softcap tanh(x / softcap)`.
        window: a query sees so many of its own block's last tokens.

    Returns:
        The output `(B, H, T, Dv)` in v's dtype and the log of Z `(B, H, T)`; a query that sees
        nothing gives 0, and its log is the smallest number.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(q, k, v, block_size, places)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    chosen = current_backend(q, _attention_unsupported(q, k, v, softcap, window))
    if chosen == "triton":
        from memwrap_kernels import landmark as kernels

        return kernels.attention(
            q, k, v, block_size, scaling=scaling, places=places, landmark=landmark, valid=valid,
            documents=documents,
        )  # fmt: skip
    first = None
    if places is None:
        first = k.shape[2] - q.shape[2]
        places = torch.arange(first, k.shape[2], device=q.device).expand(q.shape[0], -1)
    if landmark is None:
        landmark = places % (block_size + 1) == block_size
    given = (q, k, v, block_size, scaling, places, landmark, valid, documents, softcap, window)
    if chosen == "naive":
        return attention_naive(*given)
    return attention_chunked(*given, first)


def _attention_unsupported(
    q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None
) -> str:
    if current_backend(q) != "triton":
        return ""
    from memwrap_kernels import landmark as kernels

    return kernels.unsupported(q, k, v, softcap, window)


def _retrieved_unsupported(q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor) -> str:
    if current_backend(q) != "triton":
        return ""
    from memwrap_kernels import landmark as kernels

    given = (q, keys, values, landmarks)
    if any(x.device != q.device for x in given):
        return "blocks on another device"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "gradients of chosen blocks"
    return kernels.unsupported(q, keys, values)


def retrieved(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    landmarks: Tensor,
    valid: Tensor,
    ids: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Read chosen blocks: one softmax over their landmarks, within each one over its tokens.

    Args:
        q: `(B, H, T, R, Dk)`, the query as each of its blocks sees it.
        keys, values: `(B, Hkv, N, m, Dk)` and `(B, Hkv, N, m, Dv)`, on any device.
        landmarks: `(B, Hkv, N, Dk)`.
        valid: `(B, N, m)` bool; a block without a token is as one that is not there.
        ids: `(B, H, T, R)`, or `(B, H, 1, R)` for all queries; N for none.

    Returns:
        The output `(B, H, T, Dv)` and the log of the landmarks' sum `(B, H, T)`, for `merge`.
    """
    chosen = current_backend(q, _retrieved_unsupported(q, keys, values, landmarks))
    if chosen == "triton":
        from memwrap_kernels import landmark as kernels

        return kernels.retrieved(q, keys, values, landmarks, valid, ids, scaling, softcap)
    function = retrieved_naive if chosen == "naive" else retrieved_chunked
    return function(q, keys, values, landmarks, valid, ids, scaling, softcap)


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int, places: Tensor | None) -> None:
    if block_size < 1:
        raise ValueError(f"`block_size` is {block_size}; it must be at least 1.")
    if q.dim() != 4 or k.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"Queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)} do not fit: "
            "they are (B, H, T, Dk), (B, Hkv, K, Dk), (B, Hkv, K, Dv) with H a multiple of Hkv."
        )
    if places is None and k.shape[2] < q.shape[2]:
        raise ValueError(f"{q.shape[2]} queries stand behind {k.shape[2]} keys; give `places`.")
