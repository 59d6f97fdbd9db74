"""The associative memory of ARMT in fast torch: all tokens at once; formulas in
`memwrap.ops.associative`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.ops import accumulation_dtype

EPS = 1e-5


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Apply the deterministic parameter-free projection (Schlag et al. 2021, eq. 37).

    With `u = [relu(x), relu(-x)]`, the features are `u * roll(u, j)` for `j = 1..nu`.

    Args:
        x: `(..., d)`.
        nu: number of rolls.

    Returns:
        `(..., 2 * nu * d)`, non-negative.
    """
    u = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    return torch.cat([u * u.roll(j, dims=-1) for j in range(1, nu + 1)], dim=-1)


def features(x: Tensor, nu: int, normalize: bool) -> Tensor:
    """Apply DPFP in the accumulation dtype; `normalize` divides by the L2 norm (the later code)."""
    phi = dpfp(x.to(accumulation_dtype(x)), nu)
    return F.normalize(phi, dim=-1) if normalize else phi


def read_chunked(q: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
    out = q @ A
    return out if z is None else out / ((q @ z.unsqueeze(-1)) + EPS)


def write_chunked(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    z: Tensor | None,
    written: Tensor,
    correction: bool,
    key_eps: float,
) -> tuple[Tensor, Tensor | None]:
    first = ~written.view(-1, 1, 1, 1)
    previous = k @ A
    if z is None:
        previous = previous.masked_fill(first, 0.0)
        return A + k.transpose(-1, -2) @ (beta * (v - previous)), None
    denominator = k @ z.unsqueeze(-1) + EPS
    previous = (previous / denominator).masked_fill(first, 0.0)
    gamma = torch.ones_like(denominator)
    if correction:
        squared = (k * k).sum(-1, keepdim=True) + key_eps
        # A key without features has no direction to correct: 0/0 would be NaN.
        ratio = torch.where(squared > 0, denominator / squared.clamp_min(1e-38), 1.0)
        gamma = (1 - ratio).clamp(0, 1).masked_fill(first, 1.0).detach()
    new_z = z + (gamma * k).sum(-2)
    return A + k.transpose(-1, -2) @ (beta * (v - previous)), new_z
