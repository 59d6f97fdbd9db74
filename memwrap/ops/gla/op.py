"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.gla`."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend, fla, unsupported_dtypes
from memwrap.ops.gla.chunked import scan_chunked
from memwrap.ops.gla.naive import scan_naive
from memwrap.ops.gla.sequences import by_sequence, check_sequences, masked_tokens

STEP = 4  # so many tokens are decoded one after another in one launch


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and write a stretch of tokens.

    Args:
        q: `(B, H, T, Dk)`.
        k: `(B, Hkv, T, Dk)`, in q's dtype.
        v: `(B, Hkv, T, Dv)`, in q's dtype.
        g: log of the forget gate, finite and at most 0: `(B, Hkv, T, Dk)`, a gate a key channel,
            or `(B, Hkv, T)`, a gate a head, or None, nothing is forgotten.
        state: `(B, Hkv, Dk, Dv)` in float32 (float64 for float64 inputs); None for zeros.
        scale: of the queries; `Dk ** -0.5` by default.
        mask: `(B, T)` bool, true for real tokens; others write nothing and nothing decays there
            (what they read has no meaning).
        cu_seqlens: `(N + 1,)` integers from 0 to T: with B = 1, the sequences
            `[cu[i], cu[i + 1])` are independent and `state` is `(N, Hkv, Dk, Dv)`.

    Returns:
        What each token read, `(B, H, T, Dv)` in v's dtype, and the state after the last token in
        the state's dtype. All of it is differentiable, the first state and the last too.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    _check(q, k, v, g, state, mask, cu_seqlens)
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        wide = accumulation_dtype(q)
        state = q.new_zeros(rows, k.shape[1], k.shape[3], v.shape[3], dtype=wide)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        q, k, v, g = masked_tokens(mask, q, k, v, g)
    chosen = _implementation(q, k, v, g, state)
    if chosen == "fla":
        return fla.gla(q, k, v, g, state, scale, cu_seqlens)
    if chosen == "triton":
        return _scan_triton(q, k, v, g, state, scale, cu_seqlens)
    function = {"naive": scan_naive, "torch": scan_chunked}[chosen]
    if cu_seqlens is None:
        return function(q, k, v, g, state, scale)
    return by_sequence(function, cu_seqlens, (q, k, v, g), state, scale)


def _implementation(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> str:
    return current_backend(q, unsupported_dtypes(state, q, k, v), fla.unsupported(q, state))


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None,
    mask: Tensor | None, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Check shapes against the keys'; query heads are a multiple of the keys' heads."""
    check_sequences(q, k, v, state, mask, cu_seqlens)
    if g is not None and g.shape not in (k.shape, k.shape[:3]):
        raise ValueError(
            f"g is {list(g.shape)}; for keys {list(k.shape)} it must be {list(k.shape)} or "
            f"{list(k.shape[:3])}."
        )


def _scan_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from memwrap_kernels import delta, gla

    given = (q, k, v, state, *([] if g is None else [g]))
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if cu_seqlens is None and q.shape[2] <= STEP and q.shape[3] <= 256 and not trains:
        return delta.step(q, k, v, g, None, state, scale)
    return gla.scan(q, k, v, g, state, scale, cu_seqlens)
