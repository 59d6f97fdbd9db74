"""Compressing rows of a memory, and the losses that teach the compressor.

Rae et al., "Compressive Transformers for Long-Range Sequence Modelling" (2019), section 3. Shapes:
B batch, H heads (1 for hidden rows), N rows, c the rate, D channels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from memwrap.ops.buffers.left_aligned import earliest

Compression = Literal["mean", "max", "conv", "dilated_conv", "most_used"]
DILATION = 2


def blocks(rows: Tensor, rate: int, dilation: int = 1) -> Tensor:
    """Split rows into what each compressed row is made of: `(B, H, N, D)` -> `(B, H, N // c, c,
    D)`.

    With a dilation d, block i holds the rows `i c + (c - 1) - d (c - 1 - j)`, j = 0..c-1; rows
    before the first are zero.
    """
    count = rows.shape[-2] // rate
    start = torch.arange(count, device=rows.device)[:, None] * rate + rate - 1
    index = start - dilation * torch.arange(rate - 1, -1, -1, device=rows.device)
    picked = rows[..., index.clamp_min(0), :]
    return picked if dilation == 1 else picked * (index >= 0)[..., None]


def compress(
    rows: Tensor,
    rate: int,
    kind: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dilation: int = DILATION,
) -> Tensor:
    """Compress blocks of `rate` rows into one each (section 3.1, f_c).

    Args:
        rows: `(B, H, N, D)`, oldest first; rows beyond a multiple of `rate` are left out.
        rate: c.
        kind: "mean", "max", "conv" or "dilated_conv" (for "most_used" see `most_used`).
        weight: `(H, D_out, D_in, c)` of the convolutions, of kernel and stride c.
        bias: `(H, D_out)`.
        dilation: of "dilated_conv".

    Returns:
        `(B, H, N // c, D)`.
    """
    if kind == "mean":
        return blocks(rows, rate).mean(-2)
    if kind == "max":
        return blocks(rows, rate).amax(-2)
    parts = blocks(rows, rate, dilation if kind == "dilated_conv" else 1)
    out = torch.einsum("bhncd,hodc->bhno", parts, weight)
    return out if bias is None else out + bias[:, None]


def decompress(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Run the autoencoder's decoder g, a transposed convolution of kernel and stride c.

    Args:
        rows: `(B, H, n, D)`. weight: `(H, D_in, D_out, c)`. bias: `(H, D_out)`.

    Returns:
        `(B, H, n c, D)`.
    """
    out = torch.einsum("bhni,hioc->bhnco", rows, weight).flatten(2, 3)
    return out + bias[:, None]


def most_used(usage: Tensor, evicted: Tensor, rate: int) -> tuple[Tensor, Tensor]:
    """Choose the evicted rows that are kept: those with the most attention, in their order.

    Args:
        usage: `(B, N)`, attention that each row received.
        evicted: `(B,)`, rows that leave (the first ones); a multiple of `rate`.
        rate: c.

    Returns:
        Indices `(B, N // c)`, the kept rows first, and how many are kept `(B,)`.
    """
    size = usage.shape[1]
    leaving = torch.arange(size, device=usage.device) < evicted[:, None]
    order = (-usage.masked_fill(~leaving, -math.inf)).argsort(stable=True, dim=1)
    rank = order.argsort(1)
    keep = evicted // rate
    return earliest((rank < keep[:, None]) & leaving, size // rate), keep


def content_attention(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, scaling: float
) -> Tensor:
    """Attend by content alone, without mask or positions.

    Args:
        query: `(B, H, T, Dk)`. key, value: `(B, Hkv, M, ...)`. valid: `(B, M)` bool.

    Returns:
        `(B, H, T, Dv)`; zeros for batch rows without a valid row.
    """
    groups = query.shape[1] // key.shape[1]
    q = query.unflatten(1, (key.shape[1], groups))
    scores = torch.einsum("bhgtd,bhmd->bhgtm", q, key) * scaling
    visible = valid[:, None, None, None]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * visible
    return torch.einsum("bhgtm,bhmd->bhgtd", weights, value).flatten(1, 2)


def reconstruction(
    query: Tensor,
    old: tuple[Tensor, Tensor, Tensor],
    new: tuple[Tensor, Tensor, Tensor],
    *,
    scaling: float,
    query_valid: Tensor | None = None,
) -> Tensor:
    """Compute the attention reconstruction loss (section 3.2, algorithm 2): mean squared difference
    of what the queries find in the evicted rows and in their compression.

    Gradients are stopped at everything but the compressed rows; with projections made from
    frozen weights they reach the compressor alone.

    Args:
        query: `(B, H, T, Dk)`.
        old: keys and values `(B, Hkv, M, ...)` of the evicted rows, valid `(B, M)`.
        new: the same of the compressed rows.
        scaling: of the scores.
        query_valid: `(B, T)` bool.

    Returns:
        `(B,)`.
    """
    query = query.detach()
    with torch.no_grad():
        target = content_attention(query, *old, scaling)
    error = (content_attention(query, *new, scaling) - target).square().mean((1, 3))
    if query_valid is None:
        return error.mean(1)
    return (error * query_valid).sum(1) / query_valid.sum(1).clamp_min(1)


def autoencoding(old: Tensor, rebuilt: Tensor, valid: Tensor) -> Tensor:
    """Compute the autoencoding loss (section 3.2): mean squared difference `(B,)` of evicted rows
    `(B, H, M, D)` (constants) and what the decoder made of their compression, where `valid` `(B,
    M)`."""
    error = (rebuilt - old.detach()).square().mean((1, 3))
    return (error * valid).sum(1) / valid.sum(1).clamp_min(1)
