"""The compressive memory of Infini-attention in plain loops: the specification
(`memwrap.ops.infini`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.infini.chunked import phi


def _look_up_one(features: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    """Look up for one token and one head: features `(Dk,)`, M `(Dk, Dv)`, z `(Dk,)` -> `(Dv,)`."""
    denominator = (features * z).sum()
    if float(denominator.detach()) == 0.0:
        return torch.zeros_like(M[0])
    return (features[:, None] * M).sum(0) / denominator.clamp_min(eps)


def read_naive(q: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    group = q.shape[1] // M.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                features = phi(q[b, h, t]).to(M.dtype)
                rows.append(_look_up_one(features, M[b, h // group], z[b, h // group], eps))
    if not rows:
        return M.new_zeros(*q.shape[:3], M.shape[-1])
    return torch.stack(rows).view(*q.shape[:3], M.shape[-1])


def write_naive(
    k: Tensor, v: Tensor, M: Tensor, z: Tensor, delta: bool, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    rows_M, rows_z = [], []
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            new_M, new_z = M[b, h], z[b, h]
            for t in range(k.shape[2]):
                if mask is not None and not bool(mask[b, t]):
                    continue
                features, value = phi(k[b, h, t]).to(M.dtype), v[b, h, t].to(M.dtype)
                if delta:
                    value = value - _look_up_one(features, M[b, h], z[b, h], eps)
                new_M = new_M + torch.outer(features, value)
                new_z = new_z + features
            rows_M.append(new_M)
            rows_z.append(new_z)
    if not rows_M:
        return M.clone(), z.clone()
    return torch.stack(rows_M).view_as(M), torch.stack(rows_z).view_as(z)


def scan_naive(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = M.new_zeros(*q.shape[:2], 0, M.shape[-1])
    for start in range(0, q.shape[2], segment_size):
        part = slice(start, start + segment_size)
        out = torch.cat([out, read_naive(q[:, :, part], M, z, eps)], dim=2)
        part_mask = None if mask is None else mask[:, part]
        M, z = write_naive(k[:, :, part], v[:, :, part], M, z, delta, part_mask, eps)
    return out, M, z
