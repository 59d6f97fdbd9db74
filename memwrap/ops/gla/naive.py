"""Gated linear attention in a plain loop: the specification (`memwrap.ops.gla`)."""

from __future__ import annotations

import torch
from torch import Tensor


def scan_naive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    group, dtype = q.shape[1] // k.shape[1], state.dtype
    S, rows = state.clone(), []
    for t in range(q.shape[2]):
        if g is not None:
            decay = g[:, :, t].to(dtype).exp()
            S = S * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        S = S + k[:, :, t, :, None].to(dtype) * v[:, :, t, None, :].to(dtype)
        query = (q[:, :, t].to(dtype) * scale).unflatten(1, (-1, group))
        rows.append((query[..., None] * S[:, :, None]).sum(-2).flatten(1, 2))
    if not rows:
        return v.new_zeros(*q.shape[:3], v.shape[3]), S
    return torch.stack(rows, 2).to(v.dtype), S
