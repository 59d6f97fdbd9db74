"""Mixing a next-token distribution with that of retrieved neighbours (kNN-LM, equations 2 and 3).

Shapes: `...` any leading dimensions, K neighbours, V the vocabulary. Costs of neighbours are
squared distances (or negated inner products): the smaller, the nearer; infinite for one that is not
there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST = 1e-30


def naive(logits: Tensor, costs: Tensor, tokens: Tensor, weight: float, temperature: float):
    """Compute as specified, one position after the other: log of the mixed distribution `(...,
    V)`, for neighbours that are all there and 0 < weight < 1."""
    flat = logits.reshape(-1, logits.shape[-1])
    result = torch.empty_like(flat)
    for i, (z, d, v) in enumerate(
        zip(flat, costs.reshape(len(flat), -1), tokens.reshape(len(flat), -1), strict=True)
    ):
        p = torch.zeros_like(z)
        for share, token in zip((-d / temperature).softmax(0), v.tolist(), strict=True):
            p[token] += share
        result[i] = ((1 - weight) * z.softmax(0) + weight * p).log()
    return result.view_as(logits)


def neighbour_probabilities(
    costs: Tensor, tokens: Tensor, vocabulary: int, temperature: Tensor | float
) -> Tensor:
    """Compute p_kNN `(..., V)`: softmax of `-costs / temperature` `(..., K)`, summed over equal
    `tokens` `(..., K)`. Zeros where there is no neighbour at all."""
    finite = costs.isfinite()
    scores = (-costs / temperature).masked_fill(~finite, -math.inf)
    scores = scores.masked_fill(~finite.any(-1, keepdim=True), 0.0)
    shares = scores.softmax(-1) * finite
    p = shares.new_zeros(*shares.shape[:-1], vocabulary)
    return p.scatter_add(-1, tokens.clamp_min(0), shares)


def interpolate(
    logits: Tensor,
    costs: Tensor,
    tokens: Tensor,
    weight: Tensor | float,
    temperature: Tensor | float,
) -> Tensor:
    """Compute logits of `(1 - weight) softmax(logits) + weight p_kNN`.

    Args:
        logits: `(..., V)`.
        costs: `(..., K)`; infinite for a neighbour that is not there.
        tokens: `(..., K)` the neighbours' next tokens.
        weight: lambda in [0, 1), a number or `(..., 1)`.
        temperature: a number or `(..., 1)`.

    Returns:
        `(..., V)` with the log-sum-exp of `logits`: where no neighbour is, `logits` themselves.
    """
    weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
    costs = costs.to(logits.dtype)
    p = neighbour_probabilities(costs, tokens, logits.shape[-1], temperature)
    model_part = logits + torch.log1p(-weight)
    level = logits.logsumexp(-1, keepdim=True)
    store_part = p.clamp_min(_LEAST).log() + weight.clamp_min(_LEAST).log() + level
    mixed = torch.where(p > _LEAST, torch.logaddexp(model_part, store_part), model_part)
    return torch.where(costs.isfinite().any(-1, keepdim=True), mixed, logits)


def interpolate_logits(
    logits: Tensor, other: Tensor, weight: Tensor | float, temperature: float = 1.0
) -> Tensor:
    """Compute logits of `(1 - weight) softmax(logits) + weight softmax(other / temperature)`.

    Args:
        logits: `(..., V)`.
        other: `(..., U)` of another model with the same ids; those that it does not know (U < V)
            have no share in it, those beyond V are left out.
        weight: lambda in [0, 1), a number or `(..., 1)`.
        temperature: a number.

    Returns:
        `(..., V)` with the log-sum-exp of `logits`; `logits` themselves for a `weight` of 0.
    """
    weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
    known = min(other.shape[-1], logits.shape[-1])
    shares = (other[..., :known].to(logits.dtype) / temperature).log_softmax(-1)
    level = logits.logsumexp(-1, keepdim=True) + weight.clamp_min(_LEAST).log()
    model_part = logits + torch.log1p(-weight)
    mixed = torch.logaddexp(model_part[..., :known], shares + level)
    mixed = torch.cat([mixed, model_part[..., known:]], -1)
    return torch.where(weight > 0, mixed, logits)
