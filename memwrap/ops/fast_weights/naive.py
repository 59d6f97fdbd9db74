"""Fast weights in plain loops: the specification (`memwrap.ops.fast_weights`).

Every token's gradient is taken by autograd from the inner loss itself, one row, network and token
after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from memwrap.ops.fast_weights.networks import Weights
from memwrap.ops.fast_weights.rules import EPS, EPS_MUON, StepRule, WriteGates


def _network(network: str, weights: Weights, x: Tensor) -> Tensor:
    """Compute f of one vector `(Dk,)`."""
    if network == "linear":
        return weights[0] @ x
    if network == "swiglu":
        return weights[1] @ (silu(weights[0] @ x) * (weights[2] @ x))
    return x + weights[1] @ silu(weights[0] @ x)


def _descent(rule: StepRule, weights: Weights, key: Tensor, value: Tensor) -> Weights:
    """Take minus the gradient of one token's inner loss; gradients flow through it."""
    with torch.enable_grad():
        leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in weights)
        output = _network(rule.network, leaves, key)
        loss = (output - value).square().sum() if rule.squared else -(value @ output)
        taken = torch.autograd.grad(loss, leaves, create_graph=True)
    return tuple(-g if torch.is_grad_enabled() else -g.detach() for g in taken)


def muon_naive(G: Tensor, coefficients: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Orthogonalize one matrix."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / (G.square().sum().clamp_min(1e-60).sqrt() + EPS_MUON)
    for a, b, c in coefficients:
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X.T if G.shape[0] > G.shape[1] else X


def _rows_scaled(w: Tensor, like: Tensor) -> Tensor:
    rows = [row / (row.norm() + EPS) * first.norm() for row, first in zip(w, like, strict=True)]
    return torch.stack(rows)


def read_naive(network: str, weights: Weights, query: Tensor) -> Tensor:
    """Compute `fast_weights.read`."""
    group = query.shape[1] // weights[0].shape[1]
    rows = [
        _network(network, tuple(w[b, h // group] for w in weights), query[b, h, t])
        for b in range(query.shape[0])
        for h in range(query.shape[1])
        for t in range(query.shape[2])
    ]
    width = query.shape[-1] if network == "mlp" else weights[len(weights) > 1].shape[2]
    if not rows:
        return query.new_zeros(*query.shape[:3], width)
    return torch.stack(rows).view(*query.shape[:3], width)


def _one_step(
    rule: StepRule, weights: Weights, sums: Weights | None, total: Weights, first: Weights,
    taken: list[tuple[Weights, Tensor]], share: Tensor | None,
) -> tuple[Weights, Weights, Weights]:  # fmt: skip
    """Make LaCT's step from the tokens' gradients and rates."""
    new, remembered, kept = [], [], []
    for i, w in enumerate(weights):
        d = torch.zeros_like(w)
        for gradients, rate in taken:
            d = d + rate[min(i, len(rate) - 1)] * gradients[i]
        if sums is not None and share is not None:
            d = d + share * sums[i]
        step = muon_naive(d, rule.coefficients) if rule.step == "muon" else d
        kept.append(total[i] + step if rule.row_norm == "pre" else w)
        moved = kept[i] if rule.row_norm == "pre" else w + step
        new.append(_rows_scaled(moved, first[i]))
        remembered.append(d)
    return tuple(new), tuple(remembered), tuple(kept)


def _token_steps(
    weights: Weights, sums: Weights | None, taken: list[tuple[Weights, Tensor]],
    momentum: list[Tensor], decay: list[Tensor],
) -> tuple[Weights, Weights]:  # fmt: skip
    """Make Titans' steps, one a token (eq. 13, 14)."""
    S = sums if sums is not None else tuple(torch.zeros_like(w) for w in weights)
    for t, (gradients, rate) in enumerate(taken):
        u = [rate[min(i, len(rate) - 1)] * g for i, g in enumerate(gradients)]
        S = tuple(momentum[t] * s + x if momentum else x for s, x in zip(S, u, strict=True))
        weights = tuple((1 - decay[t]) * w + s for w, s in zip(weights, S, strict=True))
    return weights, S


def write_naive(
    rule: StepRule, weights: Weights, sums: Weights | None, total: Weights | None, first: Weights,
    key: Tensor, value: Tensor, gates: WriteGates, mask: Tensor | None,
) -> tuple[Weights, Weights, Weights]:  # fmt: skip
    """Compute the new weights, momenta and sums of `fast_weights.write`."""
    batch, count, tokens = key.shape[:3]
    made: list[tuple[Weights, Weights, Weights]] = []
    for b in range(batch):
        for g in range(count):

            def of(parts: Weights | None, b: int = b, g: int = g) -> Weights | None:
                return None if parts is None else tuple(p[b, g] for p in parts)

            real = [t for t in range(tokens) if mask is None or bool(mask[b, t])]
            before = tuple(w[b, g] for w in weights)
            taken = [
                (_descent(rule, before, key[b, g, t], value[b, g, t]), gates.rates[b, g, t])
                for t in real
            ]
            eta = [] if gates.momentum is None else [gates.momentum[b, g, t] for t in real]
            if rule.step == "titans":
                alpha = [gates.decay[b, g, t] for t in real]  # type: ignore[index]
                new, S = _token_steps(before, of(sums), taken, eta, alpha)
                made.append((new, S, new))
                continue
            share = torch.stack(eta).mean() if eta else None
            start = tuple(f[b, g] if f.dim() == 4 else f[g] for f in first)
            raw = of(total)
            made.append(_one_step(rule, before, of(sums), raw or before, start, taken, share))
    return tuple(  # type: ignore[return-value]
        tuple(
            torch.stack([row[part][i] for row in made]).view(batch, count, *weights[i].shape[2:])
            for i in range(len(weights))
        )
        for part in range(3)
    )
