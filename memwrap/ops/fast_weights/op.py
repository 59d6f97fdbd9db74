"""Checks, the fast form and the choice of an implementation; formulas in
`memwrap.ops.fast_weights`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memwrap.ops import current_backend
from memwrap.ops.fast_weights.naive import read_naive, write_naive
from memwrap.ops.fast_weights.networks import (
    NETWORKS,
    Weights,
    factors,
    gate_sums,
    value_of,
    weighted,
)
from memwrap.ops.fast_weights.rules import (
    EPS,
    EPS_MUON,
    NEWTON_SCHULZ,
    FastMemory,
    StepRule,
    WriteGates,
)


def read(network: str, weights: Weights, query: Tensor) -> Tensor:
    """Read the networks: `f(q)`.

    Args:
        network: one of `NETWORKS`.
        weights: `(B, G, out, in)`.
        query: `(B, H, T, Dk)`.

    Returns:
        `(B, H, T, Dv)`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(network, weights, query, "queries")
    if current_backend() == "naive":
        return read_naive(network, weights, query)
    grouped = query.unflatten(1, (weights[0].shape[1], -1)).flatten(2, 3)
    return value_of(network, weights, grouped).view(*query.shape[:3], -1)


def write(
    rule: StepRule,
    memory: FastMemory,
    key: Tensor,
    value: Tensor,
    gates: WriteGates,
    first: Weights,
    mask: Tensor | None = None,
) -> FastMemory:
    """Write the tokens of a segment at once, each against the weights that the segment found.

    Args:
        rule: how.
        memory: as the segment found it.
        key: `(B, G, T, Dk)`.
        value: `(B, G, T, Dv)`.
        gates: of the tokens.
        first: the weights before the first segment, `(G, out, in)` or `(B, G, out, in)`; the norms
            of their rows stay.
        mask: `(B, T)` bool, true for real tokens; others write nothing.

    Returns:
        The new memory; the old one is left as it is.

    Raises:
        ValueError: for shapes that do not fit, or gates that the rule needs.
    """
    _check(rule.network, memory.weights, key, "keys")
    if rule.step == "titans" and gates.decay is None:
        raise ValueError("WriteGates.decay is None; `step='titans'` needs it, (B, G, T).")
    if current_backend() == "naive":
        weights, momentum, total = write_naive(
            rule, memory.weights, memory.momentum, memory.total, first, key, value, gates, mask
        )
    else:
        weights, momentum, total = _write(rule, memory, key, value, gates, first, mask)
    return replace(
        memory,
        weights=weights,
        momentum=None if gates.momentum is None else momentum,
        total=total if rule.keeps_sum else None,
    )


def orthogonalized(G: Tensor, coefficients: tuple = NEWTON_SCHULZ) -> Tensor:
    """Bring the singular values of matrices `(..., M, N)` near 1 (Muon's Newton-Schulz steps)."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + EPS_MUON)
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def rescaled(w: Tensor, first: Tensor) -> Tensor:
    """Give every row the norm of that row in `first`."""
    norm = torch.linalg.vector_norm
    return w / (norm(w, dim=-1, keepdim=True) + EPS) * norm(first, dim=-1, keepdim=True)


def _write(
    rule: StepRule, memory: FastMemory, key: Tensor, value: Tensor, gates: WriteGates,
    first: Weights, mask: Tensor | None,
) -> tuple[Weights, Weights, Weights]:  # fmt: skip
    products = factors(rule.network, memory.weights, key, value, rule.squared)
    rates, eta, alpha = gates.rates, gates.momentum, gates.decay
    real = None if mask is None else mask[:, None]
    if real is not None:
        rates = rates.masked_fill(~real[..., None], 0.0)
    if rule.step == "titans":
        return _titans(memory, products, rates, eta, alpha, real)  # type: ignore[arg-type]
    steps = weighted(products, rates)
    if eta is not None and memory.momentum is not None:
        share = eta.mean(-1)
        if real is not None:
            share = (eta * real).sum(-1) / real.sum(-1).clamp_min(1)
        steps = tuple(
            d + share[..., None, None] * old for d, old in zip(steps, memory.momentum, strict=True)
        )
    moves = steps
    if rule.step == "muon":
        moves = tuple(orthogonalized(d, rule.coefficients) for d in steps)
    start = memory.weights
    if rule.keeps_sum and memory.total is not None:
        start = memory.total
    total = tuple(w + move for w, move in zip(start, moves, strict=True))
    return tuple(rescaled(w, f) for w, f in zip(total, first, strict=True)), steps, total


def _titans(
    memory: FastMemory, products: list[tuple[Tensor, Tensor]], rates: Tensor, eta: Tensor | None,
    alpha: Tensor, real: Tensor | None,
) -> tuple[Weights, Weights, Weights]:  # fmt: skip
    """Write as all tokens' steps together do."""
    in_weights, in_momentum, stays, of_first = gate_sums(eta, alpha, real)
    weights = tuple(
        stays[..., None, None] * w + new
        for w, new in zip(
            memory.weights, weighted(products, rates * in_weights[..., None]), strict=True
        )
    )
    if eta is None:
        return weights, weights, weights
    momentum = weighted(products, rates * in_momentum[..., None])
    if memory.momentum is not None:
        carried = (eta if real is None else eta.masked_fill(~real, 1.0)).prod(-1)[..., None, None]
        old = memory.momentum
        weights = tuple(
            w + of_first[..., None, None] * s for w, s in zip(weights, old, strict=True)
        )
        momentum = tuple(m + carried * s for m, s in zip(momentum, old, strict=True))
    return weights, momentum, weights


def _check(network: str, weights: Weights, x: Tensor, name: str) -> None:
    if network not in NETWORKS:
        raise ValueError(f"Unknown network {network!r}; allowed: {', '.join(NETWORKS)}.")
    batch, count, _, width = weights[0].shape
    if x.dim() != 4 or x.shape[0] != batch or x.shape[1] % count or x.shape[3] != width:
        raise ValueError(
            f"The {name} are {tuple(x.shape)}; they must be ({batch}, a multiple of {count}, T, "
            f"{width}) for weights {tuple(weights[0].shape)}."
        )
