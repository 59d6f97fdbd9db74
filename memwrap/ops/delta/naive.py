"""The delta rule in a plain loop: the specification (`memwrap.ops.delta`)."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.delta.chunked import unit


def scan_naive(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None,
    state: Tensor, scale: float, l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    group, dtype = q.shape[1] // k.shape[1], state.dtype
    if l2norm:
        q, k = unit(q.to(dtype)), unit(k.to(dtype))
    S, rows = state.clone(), []
    for t in range(q.shape[2]):
        key, value, strength = (x[:, :, t].to(dtype) for x in (k, v, beta))
        strength = strength if beta.dim() == 4 else strength[..., None]
        if g is not None:
            decay = g[:, :, t].to(dtype).exp()
            S = S * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
        if erase is None:
            change = strength * (value - (key[..., None] * S).sum(-2))
        else:
            erased = (erase[:, :, t].to(dtype) * key)[..., None] * S
            change = strength * value - erased.sum(-2)
        S = S + key[..., None] * change[..., None, :]
        query = (q[:, :, t].to(dtype) * scale).unflatten(1, (-1, group))
        rows.append((query[..., None] * S[:, :, None]).sum(-2).flatten(1, 2))
    if not rows:
        return v.new_zeros(*q.shape[:3], v.shape[3]), S
    return torch.stack(rows, 2).to(v.dtype), S
