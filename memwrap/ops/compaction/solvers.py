"""Least squares with bounds and with a ridge, over Gram matrices and over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.compaction.matching import Matching

SHRINK = [0.5**power for power in range(8)]  # lengths of a Newton step that are tried
SMALLEST = 1e-12  # a weight is at least that: its logarithm is the bias


def bounded_least_squares(
    gram: Tensor, target: Tensor, lower: float, upper: float, most: int = 60
) -> Tensor:
    """Minimise `x G x / 2 - b x` for x from `lower` to `upper`, by projected Newton steps.

    Every step solves for the variables that are free to move, tries shorter ones and a step of
    projected gradient, and takes the best: the objective never rises and it converges.

    Args:
        gram: `(R, t, t)`, symmetric and positive semidefinite with a positive diagonal.
        target: `(R, t)`.
        lower, upper: bounds of all variables.
        most: steps.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).rsqrt()
    gram, target = gram * scale[:, :, None] * scale[:, None, :], target * scale
    low, high = lower / scale, upper / scale
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gram = gram + eye * (100 * torch.finfo(gram.dtype).eps)
    steepest = gram.abs().sum(-1).amax(-1, keepdim=True)
    shrink = torch.tensor(SHRINK, dtype=gram.dtype, device=gram.device)[:, None, None]
    x = _solve(gram, target).clamp(low, high)
    for _ in range(most):
        slope = _times(gram, x) - target
        off = (x - (x - slope).clamp(low, high)).abs().amax(-1, keepdim=True)
        moving = off > 1e4 * torch.finfo(gram.dtype).eps * (1 + x.abs().amax(-1, keepdim=True))
        if not bool(moving.any()):
            break
        stuck = ((x <= low) & (slope > 0)) | ((x >= high) & (slope < 0))
        free = (~stuck)[:, :, None] & (~stuck)[:, None, :]
        newton = _solve(torch.where(free, gram, eye), slope.masked_fill(stuck, 0.0))
        tried = torch.cat([x - shrink * newton, (x - slope / steepest)[None]]).clamp(low, high)
        value = (tried * (_times(gram, tried) / 2 - target)).sum(-1)
        best = value.argmin(0)[None, :, None].expand(1, *x.shape)
        x = torch.where(moving, tried.gather(0, best)[0], x)
    return x * scale


def clamped_least_squares(
    rows: Tensor, target: Tensor, lower: float, upper: float, steps: int, start: Tensor | None
) -> Tensor:
    """Fit weights as published: least squares, clamped, and steps of projected gradient.

    Args:
        rows: `(N, t)`. target: `(N,)`.
        lower, upper: bounds.
        steps: of projected gradient.
        start: `(t,)` of the power iteration for its step width; None: the exact width.
    """
    x = shortest(rows, target[:, None])[:, 0].clamp(lower, upper)
    if not steps:
        return x
    if start is None:
        width = torch.linalg.matrix_norm(rows, 2).square()
    else:
        u = start / start.norm()
        for _ in range(3):
            u = rows.T @ (rows @ u / (rows @ u).norm())
            u = u / u.norm()
        width = (rows @ u).square().sum()
    for _ in range(steps):
        x = (x - rows.T @ (rows @ x - target) / width).clamp(lower, upper)
    return x


def shortest(rows: Tensor, target: Tensor) -> Tensor:
    """Give the shortest least-squares solution `(t, C)` of `rows @ x = target`."""
    if not rows.shape[1]:
        return rows.new_zeros(0, target.shape[1])
    driver = "gelsd" if rows.device.type == "cpu" else None
    if driver is None and rows.shape[0] < rows.shape[1]:
        return torch.linalg.pinv(rows) @ target
    return torch.linalg.lstsq(rows, target, driver=driver).solution


def ridge_solve(gram: Tensor, target: Tensor, ridge: Tensor) -> Tensor:
    """Solve `(G + ridge I) x = b`: gram `(R, t, t)`, target `(R, t, C)`, ridge `(R,)`."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * eye)[0]
    return torch.cholesky_solve(target, factor)


def ridge_of(gram: Tensor, filled: Tensor, matching: Matching) -> Tensor:
    """Compute the ridge `(R,)` of Gram matrices `(R, t, t)`; absent columns do not count."""
    if matching.ridge_of == "one":
        return gram.new_full((len(gram),), matching.ridge)
    if matching.ridge_of == "largest":
        return matching.ridge * torch.linalg.eigvalsh(gram)[:, -1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1) * filled
    return matching.ridge * diagonal.sum(-1) / filled.sum(-1).clamp_min(1)


def _times(gram: Tensor, x: Tensor) -> Tensor:
    """Multiply symmetric matrices `(R, t, t)` with vectors `(..., R, t)`."""
    return (gram @ x[..., None])[..., 0]


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    factor = torch.linalg.cholesky_ex(gram)[0]
    return torch.cholesky_solve(target[..., None], factor)[..., 0]
