"""The networks, and their inner gradients as products of two vectors a token and matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]
Factors = list[tuple[Tensor, Tensor]]
NETWORKS = ("swiglu", "linear", "mlp")


def shapes(network: str, key: int, value: int, inner: int) -> list[tuple[int, int]]:
    """List the matrices of a network, `(out, in)` each.

    Raises:
        ValueError: for an `"mlp"` whose keys and values have different widths: it adds its input.
    """
    if network == "linear":
        return [(value, key)]
    if network == "swiglu":
        return [(inner, key), (value, inner), (inner, key)]
    if key != value:
        raise ValueError(
            f"The network 'mlp' adds its input, {key} wide, to its output, {value} wide; use "
            "'swiglu' or 'linear'."
        )
    return [(inner, key), (value, inner)]


def _through(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows `(B, G, T, in)` with a matrix `(B, G, out, in)`."""
    return x @ weight.mT


def value_of(network: str, weights: Weights, x: Tensor) -> Tensor:
    """Compute f of `(B, G, T, Dk)`."""
    if network == "linear":
        return _through(x, weights[0])
    inside = F.silu(_through(x, weights[0]))
    if network == "swiglu":
        return _through(inside * _through(x, weights[2]), weights[1])
    return x + _through(inside, weights[1])


def factors(network: str, weights: Weights, key: Tensor, value: Tensor, squared: bool) -> Factors:
    """Compute minus the gradient of every token's inner loss, by matrix: left `(B, G, T, out)` and
    right `(B, G, T, in)`, whose outer product it is.

    The loss is `-v . f(k)`, or `|f(k) - v|^2` if `squared`.
    """

    def error(output: Tensor) -> Tensor:
        return 2 * (value - output) if squared else value

    if network == "linear":
        return [(error(_through(key, weights[0])), key)]
    before = _through(key, weights[0])
    gate = before.sigmoid()
    inside, slope = before * gate, gate * (1 + before * (1 - gate))
    if network == "mlp":
        left = error(key + _through(inside, weights[1]))
        return [(left @ weights[1] * slope, key), (left, inside)]
    linear = _through(key, weights[2])
    left = error(_through(inside * linear, weights[1]))
    back = left @ weights[1]
    return [(back * linear * slope, key), (left, inside * linear), (back * inside, key)]


def weighted(products: Factors, rates: Tensor) -> Weights:
    """Sum the outer products over the tokens, each times its rate `(B, G, T, matrices or 1)`."""
    columns = rates.expand(*rates.shape[:-1], len(products)).unbind(-1)
    return tuple(
        (left * rate[..., None]).mT @ right
        for (left, right), rate in zip(products, columns, strict=True)
    )


def gate_sums(
    momentum: Tensor | None, decay: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve Titans' recurrences over a segment, `S_t = eta_t S_{t-1} + u_t` and `M_t = (1 -
    alpha_t) M_{t-1} + S_t`, for the last token: how much of everything is in it.

    Args:
        momentum: eta `(B, G, T)` from 0 to 1; None: `S_t = u_t`.
        decay: alpha `(B, G, T)` from 0 to 1.
        real: `(B, 1, T)` bool; other tokens leave S and M as they are, and their u must be 0.

    Returns:
        Of every u in M and in S, `(B, G, T)`, and of the first M and S in the last M, `(B, G)`. (Of
        the first S in the last S it is the product of eta.)
    """
    least = torch.finfo(decay.dtype).tiny
    if real is not None:
        decay = decay.masked_fill(~real, 0.0)
        momentum = None if momentum is None else momentum.masked_fill(~real, 1.0)
    stay = (1 - decay).clamp_min(least).log().cumsum(-1)
    left = (stay[..., -1:] - stay).exp()  # of S_t in the last M, by itself
    left = left if real is None else left.masked_fill(~real, 0.0)
    if momentum is None:
        last = torch.zeros_like(left)
        last[..., -1] = 1
        return left, last, stay[..., -1].exp(), torch.zeros_like(stay[..., -1])
    moved = momentum.clamp_min(least).log().cumsum(-1)
    power = moved[..., None, :] - moved[..., :, None]  # from t (rows) to s (columns)
    later = torch.ones_like(power[0, 0], dtype=torch.bool).triu()
    reach = power.masked_fill(~later, -torch.inf).exp()
    of_first = (moved.exp() * left).sum(-1)
    total = (reach * left[..., None, :]).sum(-1)
    return total, reach[..., -1], stay[..., -1].exp(), of_first
