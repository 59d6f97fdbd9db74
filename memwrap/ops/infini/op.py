"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.infini`."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import current_backend, unsupported_dtypes
from memwrap.ops.infini.chunked import read_chunked, scan_chunked, write_chunked
from memwrap.ops.infini.naive import read_naive, scan_naive, write_naive

EPS = 1e-10
UPDATES = ("linear", "delta")


def read(q: Tensor, M: Tensor, z: Tensor, *, eps: float = EPS) -> Tensor:
    """Read the memory: `phi(q) M / (phi(q) z)`, and 0 where it is empty (eq. 3).

    Args:
        q: raw queries `(B, H, T, Dk)`.
        M: `(B, Hkv, Dk, Dv)`.
        z: `(B, Hkv, Dk)`.
        eps: the denominator is at least this.

    Returns:
        `(B, H, T, Dv)` in M's dtype.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(q, None, None, M, z, None)
    function = {"naive": read_naive, "torch": read_chunked, "triton": _read_triton}
    return function[_implementation(M, q)](q, M, z, eps)


def write(
    k: Tensor,
    v: Tensor,
    M: Tensor,
    z: Tensor,
    *,
    update: str = "linear",
    mask: Tensor | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """Write the tokens of one segment at once, each against the memory as it was before.

    `M += phi(k)^T (v - v_prev)` and `z += sum_t phi(k_t)`; `v_prev` is 0 for the linear update
    (eq. 4) and what the memory returns for `k` for the delta rule (eq. 5).

    Args:
        k: raw keys `(B, Hkv, T, Dk)`.
        v: values `(B, Hkv, T, Dv)`.
        M, z: the memory.
        update: `"linear"` or `"delta"`.
        mask: `(B, T)` bool, true for real tokens; others write nothing.
        eps: the denominator of `v_prev` is at least this.

    Returns:
        The new `(M, z)`; the old ones are left as they are.

    Raises:
        ValueError: for shapes that do not fit or an unknown update.
    """
    _check(None, k, v, M, z, mask)
    _check_update(update)
    function = {"naive": write_naive, "torch": write_chunked, "triton": _write_triton}
    return function[_implementation(M, k, v)](k, v, M, z, update == "delta", mask, eps)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    M: Tensor,
    z: Tensor,
    segment_size: int,
    *,
    update: str = "linear",
    mask: Tensor | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go through all segments of a sequence: each is read with the memory before it, then written.

    Args:
        q: raw queries `(B, H, T, Dk)`.
        k: raw keys `(B, Hkv, T, Dk)`.
        v: values `(B, Hkv, T, Dv)`.
        M, z: the memory before the first segment.
        segment_size: tokens a segment; the last may be shorter and is written too.
        update, mask, eps: as in `write`.

    Returns:
        What each token read, `(B, H, T, Dv)` in M's dtype, and the memory `(M, z)` after the
        last segment. All of it is differentiable, the first memory and the last too.

    Raises:
        ValueError: for shapes that do not fit, an unknown update or a segment size below 1.
    """
    _check(q, k, v, M, z, mask)
    _check_update(update)
    if segment_size < 1:
        raise ValueError(f"segment_size is {segment_size}; it must be at least 1.")
    function = {"naive": scan_naive, "torch": scan_chunked, "triton": _scan_triton}
    chosen = function[_implementation(M, q, k, v)]
    return chosen(q, k, v, M, z, segment_size, update == "delta", mask, eps)


def _implementation(M: Tensor, *inputs: Tensor) -> str:
    unsupported = unsupported_dtypes(M, *inputs)
    limit = 128 if any(x.dtype == torch.float32 for x in inputs) else 256
    if max(M.shape[2:]) > limit:
        unsupported = f"head dims {list(M.shape[2:])}; with {inputs[0].dtype} they go up to {limit}"
    return current_backend(inputs[0], unsupported)


def _check_update(update: str) -> None:
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}; allowed: {', '.join(UPDATES)}.")


def _check(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, M: Tensor, z: Tensor,
    mask: Tensor | None,
) -> None:  # fmt: skip
    """Check shapes against the memory's; query heads are a multiple of its heads."""
    if M.dim() != 4 or z.shape != M.shape[:3]:
        raise ValueError(
            f"The memory has M {list(M.shape)} and z {list(z.shape)}; they must be "
            "(B, Hkv, Dk, Dv) and (B, Hkv, Dk)."
        )
    batch, heads, keys, values = M.shape
    if q is not None and (
        q.dim() != 4 or q.shape[0] != batch or q.shape[1] % heads or q.shape[3] != keys
    ):
        raise ValueError(
            f"q is {list(q.shape)}; for this memory it must be ({batch}, a multiple of {heads}, "
            f"T, {keys})."
        )
    if k is None or v is None:
        return
    tokens = k.shape[2] if k.dim() == 4 else -1
    if k.shape != (batch, heads, tokens, keys) or v.shape != (batch, heads, tokens, values):
        raise ValueError(
            f"k is {list(k.shape)} and v is {list(v.shape)}; for this memory they must be "
            f"({batch}, {heads}, T, {keys}) and ({batch}, {heads}, T, {values})."
        )
    if q is not None and q.shape[2] != tokens:
        raise ValueError(f"q has {q.shape[2]} tokens and k has {tokens}; they must agree.")
    if mask is not None and (mask.shape != (batch, tokens) or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {list(mask.shape)} of {mask.dtype}; it must be ({batch}, {tokens}) of "
            "torch.bool."
        )


def _read_triton(q: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    from memwrap_kernels import infini as kernels

    return kernels.lookup(q, M.unsqueeze(2), z.unsqueeze(2), max(q.shape[2], 1), eps)


def _write_triton(
    k: Tensor, v: Tensor, M: Tensor, z: Tensor, delta: bool, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from memwrap_kernels import infini as kernels

    states, zs = kernels.states(k, v, M, z, mask, max(k.shape[2], 1), delta, eps)
    return states[:, :, -1].clone(), zs[:, :, -1].clone()


def _scan_triton(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from memwrap_kernels import infini_scan as kernels

    return kernels.scan(q, k, v, M, z, mask, segment_size, delta, eps)
