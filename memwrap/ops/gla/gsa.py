"""Gated slot attention: M slots a head that decay and fill by their own gates, read twice.

Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling" (2024), eq. 7-9.
Shapes as in `memwrap.ops.gla`, with M slots. For each token, with s_t the weights at which the
slots take it in:

    K_t = exp(g_t) * K_{t-1} + s_t k_t^T        p_t = softmax(scale * K_t q_t)
    V_t = exp(g_t) * V_{t-1} + s_t v_t^T        o_t = p_t V_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend, fla
from memwrap.ops.gla.chunked import scan_chunked, scan_value_gated
from memwrap.ops.gla.sequences import check_sequences, masked_tokens

__all__ = ["scan"]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Read and write a stretch of tokens.

    Args:
        q: `(B, H, T, Dk)`.
        k: `(B, Hkv, T, Dk)`.
        v: `(B, Hkv, T, Dv)`.
        s: `(B, Hkv, T, M)`, how much each slot takes in, `1 - exp(g)` in the paper.
        g: `(B, Hkv, T, M)`, log of the slots' forget gates, finite and at most 0.
        state: the slots' keys `(B, Hkv, Dk, M)` and values `(B, Hkv, M, Dv)` in float32 (float64
            for float64 inputs); None for zeros.
        scale: of the queries; `Dk ** -0.5` by default.
        mask: `(B, T)` bool, true for real tokens; others write nothing and nothing decays there.

    Returns:
        What each token read, `(B, H, T, Dv)` in v's dtype, and the state after the last token.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    if s.shape != g.shape or s.shape[:3] != k.shape[:3] or s.dim() != 4:
        raise ValueError(
            f"s is {list(s.shape)} and g is {list(g.shape)}; both must be "
            f"({', '.join(map(str, k.shape[:3]))}, M)."
        )
    wide, slots = accumulation_dtype(q), s.shape[3]
    if state is None:
        state = (
            q.new_zeros(*k.shape[:2], k.shape[3], slots, dtype=wide),
            q.new_zeros(*k.shape[:2], slots, v.shape[3], dtype=wide),
        )
    check_sequences(q, k, s.to(q.dtype), state[0], mask, None)
    check_sequences(q.new_empty(*q.shape[:3], slots), s.to(q.dtype), v, state[1], mask, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        q, k, v, s, g = masked_tokens(mask, q, k, v, s, g)
    chosen = current_backend(q, "gated slot attention", fla.unsupported(q, state[0]))
    if chosen == "fla":
        return fla.gsa(q, k, v, s, g, state, scale)
    if chosen == "naive":
        return _scan_naive(q, k, v, s, g, state, scale)
    dtype, q, k, v = v.dtype, q.to(wide), k.to(wide), v.to(wide)
    scores, keys = scan_value_gated(q, k, s.to(wide), g, state[0], scale)
    out, values = scan_chunked(scores.softmax(-1), s.to(wide), v, g, state[1], 1.0)
    return out.to(dtype), (keys, values)


def _scan_naive(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, state: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Compute it as specified."""
    group, dtype = q.shape[1] // k.shape[1], state[0].dtype
    K, V = (x.clone() for x in state)
    rows = []
    for t in range(q.shape[2]):
        key, value, slot = (x[:, :, t].to(dtype) for x in (k, v, s))
        decay = g[:, :, t].to(dtype).exp()
        K = K * decay[..., None, :] + key[..., None] * slot[..., None, :]
        V = V * decay[..., None] + slot[..., None] * value[..., None, :]
        query = (q[:, :, t].to(dtype) * scale).unflatten(1, (-1, group))
        weights = (query[..., None] * K[:, :, None]).sum(-2).softmax(-1)
        rows.append((weights[..., None] * V[:, :, None]).sum(-2).flatten(1, 2))
    if not rows:
        return v.new_zeros(*q.shape[:3], v.shape[3]), (K, V)
    return torch.stack(rows, 2).to(v.dtype), (K, V)
