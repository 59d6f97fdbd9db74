"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.delta`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend, fla, unsupported_dtypes
from memwrap.ops.delta.chunked import scan_chunked
from memwrap.ops.delta.naive import scan_naive
from memwrap.ops.gla.sequences import by_sequence, check_sequences, masked_tokens


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    scale: float | None = None,
    l2norm: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and write a stretch of tokens.

    Args:
        q: `(B, H, T, Dk)`.
        k: `(B, Hkv, T, Dk)`, in q's dtype.
        v: `(B, Hkv, T, Dv)`, in q's dtype.
        beta: strength of the write: `(B, Hkv, T)`, or `(B, Hkv, T, Dv)` a value channel.
        g: log of the forget gate, finite and at most 0: `(B, Hkv, T)`, a gate a head, or
            `(B, Hkv, T, Dk)`, a gate a key channel; None: nothing is forgotten.
        state: `(B, Hkv, Dk, Dv)` in float32 (float64 for float64 inputs); None for zeros.
        erase: strength at which a key's old value is taken away, `(B, Hkv, T, Dk)`; None: beta.
        scale: of the queries; `Dk ** -0.5` by default.
        l2norm: make queries and keys unit vectors first (`unit`), in the accumulation dtype.
        mask: `(B, T)` bool, true for real tokens; others write nothing and nothing decays there.
        cu_seqlens: `(N + 1,)` integers from 0 to T: with B = 1, the sequences
            `[cu[i], cu[i + 1])` are independent and `state` is `(N, Hkv, Dk, Dv)`.

    Returns:
        What each token read, `(B, H, T, Dv)` in v's dtype, and the state after the last token in
        the state's dtype. All of it is differentiable, the first state and the last too.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    _check(q, k, v, beta, g, erase, state, mask, cu_seqlens)
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        wide = accumulation_dtype(q)
        state = q.new_zeros(rows, k.shape[1], k.shape[3], v.shape[3], dtype=wide)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        q, k, v, beta, g, erase = masked_tokens(mask, q, k, v, beta, g, erase)
    chosen = _implementation(q, k, v, beta, g, erase, state)
    if chosen == "fla":
        return fla.delta(q, k, v, beta, g, state, scale, l2norm, cu_seqlens)
    if chosen == "triton":
        return _scan_triton(q, k, v, beta, g, state, scale, l2norm, cu_seqlens)
    scans: dict[str, Callable[..., Any]] = {"naive": scan_naive, "torch": scan_chunked}
    function = partial(scans[chosen], l2norm=l2norm)
    tensors = q, k, v, beta, g, erase
    if cu_seqlens is None:
        return function(*tensors, state, scale)
    return by_sequence(function, cu_seqlens, tensors, state, scale)


def _implementation(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None,
    state: Tensor,
) -> str:  # fmt: skip
    if erase is not None or (g is not None and g.dim() == 4):
        by_channel = "a gate for each key channel of the delta rule"
        return current_backend(q, by_channel, by_channel)
    reason = unsupported_dtypes(state, q, k, v)
    if not reason and current_backend(q) == "triton":
        from memwrap_kernels import delta as kernels

        reason = kernels.unsupported(q, k, v, beta)
    return current_backend(q, reason, fla.unsupported(q, state, beta))


def _check(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, erase: Tensor | None,
    state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    check_sequences(q, k, v, state, mask, cu_seqlens)
    if beta.shape not in (v.shape, v.shape[:3]):
        raise ValueError(
            f"beta is {list(beta.shape)}; for values {list(v.shape)} it must be "
            f"{list(v.shape[:3])} or {list(v.shape)}."
        )
    if g is not None and g.shape not in (k.shape[:3], k.shape):
        raise ValueError(
            f"g is {list(g.shape)}; it must be {list(k.shape[:3])} or {list(k.shape)}."
        )
    if erase is not None and erase.shape != k.shape:
        raise ValueError(f"erase is {list(erase.shape)}; it must be {list(k.shape)}.")


def _scan_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor,
    scale: float, l2norm: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from memwrap_kernels import delta

    return delta.scan(q, k, v, beta, g, state, scale, l2norm, cu_seqlens)
