"""The delta rule in fast torch; formulas in `memwrap.ops.delta`.

Inside a chunk the changes `u_t = beta_t (v_t - k_t S')` depend on each other through one triangular
system (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 3): with
`A_ti = beta_t (k_t k_i) exp(g_i+1 + ... + g_t)` below the diagonal, `(1 + A) u = beta (v - k S)`,
S the state before the chunk. Its inverse is found for all chunks at once; only `k S` waits for S.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype
from memwrap.ops.gla.chunked import (
    LOG2_E,
    chunk_size,
    chunked,
    decayed,
    grouped,
    in_blocks,
    read_token,
    ungrouped,
)

EPS = 1e-6
CHUNK = 32  # at 64 the triangular systems take longer than all else


def unit(x: Tensor) -> Tensor:
    """Normalise over the last dimension, `x / sqrt(sum(x^2) + 1e-6)`, in x's dtype."""
    wide = x.to(accumulation_dtype(x))
    return (wide * (wide.square().sum(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def between(g: Tensor) -> Tensor:
    """Sum gates, `(..., C)` -> `(..., C, C)`: what a gate sums to from behind token i up to token t
    (0 where i >= t). Summed, not subtracted: a strong gate before i leaves no rounding error
    behind."""
    size = g.shape[-1]
    return g[..., None].expand(*g.shape, size).tril(-1).cumsum(-2)


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `delta.scan`."""
    if q.shape[2] == 1:
        return _token(q, k, v, beta, g, state, scale, l2norm)
    if beta.dim() == 4:
        return _by_channel(q, k, v, beta, g, state, scale, l2norm)
    function = partial(_block, scale=scale, l2norm=l2norm)
    return in_blocks(function, (q, k, v, beta, g), state)


def _token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take in a single token, as in decoding: no system to be solved."""
    dtype, strength = state.dtype, beta if beta.dim() == 4 else beta[..., None]
    q, k = q.to(dtype), k.to(dtype)
    if l2norm:
        q, k = unit(q), unit(k)
    state = decayed(state, g)
    change = strength.to(dtype) * (v.to(dtype) - k @ state)
    state = torch.addcmul(state, k.mT, change)
    return read_token(q, state, scale, v.dtype), state


def _by_channel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Turn value channels with strengths of their own into heads of one channel each."""
    heads, width = v.shape[1], v.shape[3]
    q = q.unflatten(1, (heads, 1, -1)).expand(-1, -1, width, -1, -1, -1)
    group = q.shape[3]
    k = k.repeat_interleave(width, 1)
    g = None if g is None else g.repeat_interleave(width, 1)
    v, beta = (x.transpose(2, 3).flatten(1, 2) for x in (v, beta))
    state = state.transpose(2, 3).flatten(1, 2)[..., None]
    out, state = scan_chunked(q.flatten(1, 3), k, v[..., None], beta, g, state, scale, l2norm)
    out = out.squeeze(-1).unflatten(1, (heads, width, group)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return out, state.squeeze(-1).unflatten(1, (heads, width)).transpose(2, 3)


def _block(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, *,
    scale: float, l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, dtype = q.shape[2], state.dtype
    size = min(CHUNK, chunk_size(tokens))
    if l2norm:
        q, k = unit(q.to(dtype)), unit(k.to(dtype))
    queries = grouped(q, k.shape[1], size, scale, dtype)
    keys, values = chunked(k, size, dtype), chunked(v, size, dtype)
    strength = chunked(beta, size, dtype)
    same = (keys @ keys.mT) * strength[..., None]
    scores = (queries.flatten(-3, -2) @ keys.mT).unflatten(-2, queries.shape[-3:-1])
    first_keys, last_keys, decay = keys, keys, None  # as the chunk's first, last state sees them
    if g is None:
        scores = scores * torch.ones_like(same[0, 0, 0]).tril()[:, None]
    else:
        logs = chunked(g, size, dtype) * LOG2_E
        pairs, prefix = between(logs).exp2(), logs.cumsum(-1).exp2()[..., None]
        scores, same = scores * pairs.tril()[..., None, :], same * pairs
        first_keys, last_keys = keys * prefix, keys * pairs[..., -1, :, None]
        queries, decay = queries * prefix[..., None], prefix[..., -1:, :]
    inverse = torch.linalg.solve_triangular(
        same.tril(-1), torch.diag_embed(strength), upper=False, unitriangular=True
    )
    before, change, state = _changes(first_keys, last_keys, values, inverse, decay, state)
    inner = (scores.flatten(-3, -2) @ change).flatten(0, 2)
    out = torch.baddbmm(inner, queries.flatten(-3, -2).flatten(0, 2), before.flatten(0, 2))
    return ungrouped(out.view(*queries.shape[:-1], -1), tokens, v.dtype), state


def _changes(
    first_keys: Tensor, last_keys: Tensor, values: Tensor, inverse: Tensor, decay: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Go chunk after chunk: `u = (1 + A)^-1 beta (v - k S)`, then `S' = decay S + k^T u`.

    Args:
        first_keys, last_keys, values: `(B, H, N, C, D)`.
        inverse: `(1 + A)^-1 beta`, `(B, H, N, C, C)`.
        decay: `(B, H, N, 1, 1)`; None for 1.
        state: `(B, H, Dk, Dv)`.

    Returns:
        States before each chunk, all changes u, and the state after the last chunk.
    """
    # Rows and heads as one dimension: products with a sum (`baddbmm`) know three.
    steps = [x.flatten(0, 1).unbind(1) for x in (first_keys, last_keys.mT, values, inverse)]
    decays = [None] * len(steps[0]) if decay is None else decay.flatten(0, 1).unbind(1)
    states, changes = [state.flatten(0, 1)], []
    for first, last, own_values, solved, own_decay in zip(*steps, decays, strict=True):
        old = states[-1]
        changes.append(solved @ torch.baddbmm(own_values, first, old, alpha=-1))
        kept = old if own_decay is None else old * own_decay
        states.append(torch.baddbmm(kept, last, changes[-1]))
    shape = values.shape[:2]
    before = torch.stack(states[:-1], 1).unflatten(0, shape)
    return before, torch.stack(changes, 1).unflatten(0, shape), states[-1].unflatten(0, shape)
