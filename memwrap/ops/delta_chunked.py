"""The delta rule in fast torch; formulas in `memwrap.ops.delta`.

Inside a chunk the changes `u_t = beta_t (v_t - k_t S')` depend on each other through one triangular
system (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 3): with
`A_ti = beta_t (k_t k_i) exp(g_i+1 + ... + g_t)` below the diagonal, `(1 + A) u` is what the tokens
would write if the state before the chunk were all there is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memwrap.ops.gla_chunked import between, chunk_size, chunked, grouped, in_blocks, ungrouped


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`delta.scan`."""
    if beta.dim() == 4:
        return _by_channel(q, k, v, beta, g, state, scale)
    return in_blocks(partial(_block, scale=scale), (q, k, v, beta, g), state)


def _by_channel(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """With a strength for each value channel the channels are heads of one channel each."""
    heads, width = v.shape[1], v.shape[3]
    q = q.unflatten(1, (heads, 1, -1)).expand(-1, -1, width, -1, -1, -1)
    group = q.shape[3]
    k = k.repeat_interleave(width, 1)
    g = None if g is None else g.repeat_interleave(width, 1)
    v, beta = (x.transpose(2, 3).flatten(1, 2) for x in (v, beta))
    state = state.transpose(2, 3).flatten(1, 2)[..., None]
    out, state = scan_chunked(q.flatten(1, 3), k, v[..., None], beta, g, state, scale)
    out = out.squeeze(-1).unflatten(1, (heads, width, group)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return out, state.squeeze(-1).unflatten(1, (heads, width)).transpose(2, 3)


def _block(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    tokens, dtype = q.shape[2], state.dtype
    size = chunk_size(tokens)
    queries = grouped(q, k.shape[1], size, dtype) * scale
    keys, values = chunked(k, size, dtype), chunked(v, size, dtype)
    strength = chunked(beta, size, dtype)[..., None]
    scores = (queries.flatten(-3, -2) @ keys.transpose(-1, -2)).unflatten(-2, queries.shape[-3:-1])
    same = keys @ keys.transpose(-1, -2)
    first_keys, last_keys, decay = keys, keys, None  # as the chunk's first, last state sees them
    if g is None:
        scores = scores * torch.ones_like(same[0, 0, 0]).tril()[:, None]
    else:
        logs = chunked(g, size, dtype)
        pairs = between(logs)
        prefix, weights = logs.cumsum(-1).exp()[..., None], pairs.exp().tril()
        scores, same = scores * weights[..., None, :], same * weights
        first_keys, last_keys = keys * prefix, keys * pairs[..., -1, :, None].exp()
        queries, decay = queries * prefix[..., None], prefix[..., -1:, :]
    wanted = torch.cat([values, first_keys], -1) * strength
    solved = torch.linalg.solve_triangular(
        (same * strength).tril(-1), wanted, upper=False, unitriangular=True
    )
    new, old = solved.split([values.shape[-1], keys.shape[-1]], -1)
    new, old = solved.split([values.shape[-1], keys.shape[-1]], -1)
    last_keys = last_keys.transpose(-1, -2)
    states, changes = [state], []
    for n in range(keys.shape[2]):
        changes.append(new[:, :, n] - old[:, :, n] @ states[-1])
        written = last_keys[:, :, n] @ changes[-1]
        kept = states[-1] if decay is None else states[-1] * decay[:, :, n]
        states.append(kept + written)
    before, change = torch.stack(states[:-1], 2), torch.stack(changes, 2)
    out = queries.flatten(-3, -2) @ before + scores.flatten(-3, -2) @ change
    return ungrouped(out.unflatten(-2, queries.shape[-3:-1]), tokens, v.dtype), states[-1]
