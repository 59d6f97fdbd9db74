"""The delta rule in fast torch; formulas in `memwrap.ops.delta`.

Inside a chunk the changes `u_t = beta_t (v_t - k_t S')` depend on each other through one triangular
system (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 3): with
`A_ti = beta_t (k_t k_i) exp(g_i+1 + ... + g_t)` below the diagonal, `(1 + A) u = beta (v - k S)`,
S the state before the chunk. Its inverse is found for all chunks at once; only `k S` waits for S.

With a gate a key channel (`_block_by_key`) the decay between two tokens is a part of their product,
`A_ti = sum_c e_tc k_ic exp(g_(i+1)c + ... + g_tc)` with e what a token erases with, `b_t * k_t`.
Weak gates are split into a factor of either token; strong ones meet at the seams of halves, as in
`memwrap.ops.gla.chunked`, so that no factor is above 1.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.ops import accumulation_dtype
from memwrap.ops.gla.chunked import (
    LOG2_E,
    allowed_length,
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
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None,
    state: Tensor, scale: float, l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `delta.scan`."""
    if q.shape[2] == 1:
        return _token(q, k, v, beta, g, erase, state, scale, l2norm)
    if beta.dim() == 4 and erase is None:
        return _by_channel(q, k, v, beta, g, state, scale, l2norm)
    if erase is not None or (g is not None and g.dim() == 4):
        function = partial(_block_by_key, scale=scale, l2norm=l2norm)
        return in_blocks(function, (q, k, v, beta, g, erase), state)
    return in_blocks(partial(_block, scale=scale, l2norm=l2norm), (q, k, v, beta, g), state)


def _token(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None,
    state: Tensor, scale: float, l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take in a single token, as in decoding: no system to be solved."""
    dtype, strength = state.dtype, beta if beta.dim() == 4 else beta[..., None]
    q, k = q.to(dtype), k.to(dtype)
    if l2norm:
        q, k = unit(q), unit(k)
    state = decayed(state, g)
    strength, v_wide = strength.to(dtype), v.to(dtype)
    if erase is None:
        change = strength * (v_wide - k @ state)
    else:
        change = strength * v_wide - (erase.to(dtype) * k) @ state
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
    out, state = scan_chunked(q.flatten(1, 3), k, v[..., None], beta, g, None, state, scale, l2norm)
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


def _block_by_key(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None,
    state: Tensor, *, scale: float, l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute a block whose gates or strengths of erasing are of single key channels."""
    tokens, dtype = q.shape[2], state.dtype
    k = unit(k.to(dtype)) if l2norm else k.to(dtype)
    q = unit(q.to(dtype)) if l2norm else q
    strength = (beta if beta.dim() == 4 else beta[..., None]).to(dtype)
    gates = torch.zeros_like(k) if g is None else g.to(dtype) * LOG2_E
    gates = gates if gates.dim() == 4 else gates[..., None].expand_as(k)
    size = min(CHUNK, chunk_size(tokens))
    size, strong = allowed_length(chunked(gates, size, dtype))
    logs, keys = chunked(gates, size, dtype), chunked(k, size, dtype)
    erasing = chunked(k * (strength if erase is None else erase.to(dtype)), size, dtype)
    values = chunked(v.to(dtype) * strength, size, dtype)
    queries = grouped(q, k.shape[1], size, scale, dtype)
    rows = torch.cat([queries, erasing[..., None, :]], -2)
    decayed_rows = rows * logs.cumsum(-2).exp2()[..., None, :]
    if strong:
        pairs = _pairs(rows, keys, logs)
    else:
        rest = (keys * logs.cumsum(-2).neg().exp2()).mT
        pairs = (decayed_rows.flatten(-3, -2) @ rest).unflatten(-2, rows.shape[-3:-1])
    seen = torch.ones_like(pairs[0, 0, 0, :, 0]).tril()
    scores, same = pairs[..., :-1, :] * seen[:, None], pairs[..., -1, :].tril(-1)
    one = torch.eye(size, dtype=dtype, device=q.device).expand_as(same)
    inverse = torch.linalg.solve_triangular(same, one, upper=False, unitriangular=True)
    last_keys = keys * behind(logs).exp2()
    decay = logs.sum(-2).exp2()[..., None]
    before, change, state = _changes(
        decayed_rows[..., -1, :], last_keys, values, inverse, decay, state
    )
    queries = decayed_rows[..., :-1, :].flatten(-3, -2)
    inner = (scores.flatten(-3, -2) @ change).flatten(0, 2)
    out = torch.baddbmm(inner, queries.flatten(0, 2), before.flatten(0, 2))
    return ungrouped(out.view(*scores.shape[:-1], -1), tokens, v.dtype), state


def behind(g: Tensor) -> Tensor:
    """Sum gates `(..., C, D)` from behind each token up to the last."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _pairs(rows: Tensor, keys: Tensor, logs: Tensor) -> Tensor:
    """Compute what each token's rows see of each key up to it, for gates of any strength.

    Args:
        rows: `(..., C, R, D)`. keys: `(..., C, D)`.
        logs: of the gates, to base 2, as `keys`.

    Returns:
        `(..., C, R, C)`, 0 behind the token.
    """
    out, size = (rows * keys[..., None, :]).sum(-1)[..., None, :, None], 1
    while size < keys.shape[-2]:
        halves = (-1, 2, size)
        late = rows.unflatten(-3, halves)[..., 1, :, :, :]
        early = keys.unflatten(-2, halves)[..., 0, :, :]
        early_logs, late_logs = logs.unflatten(-2, halves).unbind(-3)
        late = late * late_logs.cumsum(-2).exp2()[..., None, :]
        early = early * behind(early_logs).exp2()
        met = (late.flatten(-3, -2) @ early.mT).unflatten(-2, late.shape[-3:-1])
        first, second = out.unflatten(-4, (-1, 2)).unbind(-4)
        out = torch.cat([F.pad(first, (0, size)), torch.cat([met, second], -1)], -3)
        size *= 2
    return out.squeeze(-4)


def _changes(
    first_keys: Tensor, last_keys: Tensor, values: Tensor, inverse: Tensor, decay: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Go chunk after chunk: `u = (1 + A)^-1 beta (v - k S)`, then `S' = decay S + k^T u`.

    Args:
        first_keys, last_keys, values: `(B, H, N, C, D)`.
        inverse: `(1 + A)^-1 beta`, `(B, H, N, C, C)`.
        decay: `(B, H, N, 1, 1)` or, by key channel, `(B, H, N, Dk, 1)`; None for 1.
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
