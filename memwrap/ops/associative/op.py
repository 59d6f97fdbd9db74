"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.associative`."""

from __future__ import annotations

from torch import Tensor

from memwrap.ops import current_backend, unsupported_dtypes
from memwrap.ops.associative.chunked import EPS, features, read_chunked, write_chunked
from memwrap.ops.associative.naive import read_naive, write_naive


def read(q: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
    """Read the memory: `q A / (q z + eps)`, or `q A` if `z` is None.

    Args:
        q: query features `(B, H, T, K)`.
        A: `(B, H, K, V)`.
        z: `(B, H, K)` or None (no denominator).

    Returns:
        `(B, H, T, V)`.
    """
    return (read_naive if current_backend() == "naive" else read_chunked)(q.to(A.dtype), A, z)


def write(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    z: Tensor | None,
    written: Tensor,
    *,
    correction: bool = True,
    key_eps: float = EPS,
) -> tuple[Tensor, Tensor | None]:
    """Write M tokens in parallel, each against the memory as it was before.

    `A += sum_i k_i (beta_i (v_i - v_prev_i))^T` and `z += sum_i gamma_i k_i`, where `v_prev`
    is what the memory returns for `k_i` and `gamma_i = clip(1 - z k_i / |k_i|^2, 0, 1)`
    (a constant for gradients). On the first write of a row, `v_prev = 0` and `gamma = 1`.

    Args:
        k: key features `(B, H, M, K)`.
        v: values `(B, H, M, V)`.
        beta: write strengths `(B, H, M, 1)` or, one a channel, `(B, H, M, V)`.
        A, z: the memory; `z` None for the plain delta rule without denominator.
        written: `(B,)` bool, whether the row has been written before. A flag, not a test of
            `z == 0`: with tiny keys the general formula gives another gamma.
        correction: False sets gamma to 1.
        key_eps: added to `|k|^2` (0 for normalised features).

    Returns:
        The new `(A, z)`; the old ones are left as they are.
    """
    function = write_naive if current_backend() == "naive" else write_chunked
    k, v, beta = k.to(A.dtype), v.to(A.dtype), beta.to(A.dtype)
    return function(k, v, beta, A, z, written, correction, key_eps)


def read_projected(x: Tensor, A: Tensor, z: Tensor | None, *, nu: int, normalize: bool) -> Tensor:
    """Read the memory with raw queries: features, then `read`.

    Args:
        x: projected queries `(B, H, T, D)`.
        A: `(B, H, K, V)`.
        z: `(B, H, K)` or None (no denominator).
        nu, normalize: the feature map's, as in `features`.

    Returns:
        `(B, H, T, V)` in A's dtype.
    """
    if _implementation(A, x) == "triton":
        from memwrap_kernels import armt as kernels

        return kernels.read(x, A, z, nu, normalize, EPS)
    return read(features(x, nu, normalize), A, z)


def write_projected(
    x: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    z: Tensor | None,
    written: Tensor,
    *,
    nu: int,
    normalize: bool,
    correction: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Write M tokens with raw keys: features, then `write`.

    Args:
        x: projected keys `(B, H, M, D)`.
        v, beta, A, z, written, correction: as in `write`.
        nu, normalize: the feature map's, as in `features`. Normalised features need no
            `key_eps`.

    Returns:
        The new `(A, z)`; the old ones are left as they are.
    """
    key_eps = 0.0 if normalize else EPS
    if _implementation(A, x, v, beta) == "triton":
        from memwrap_kernels import armt as kernels

        new_A, new_z = kernels.write(
            x, v, beta, A, z, written, nu, normalize, correction, key_eps, EPS
        )
        return new_A, None if z is None else new_z
    return write(
        features(x, nu, normalize), v, beta, A, z, written, correction=correction, key_eps=key_eps
    )


def _implementation(A: Tensor, *inputs: Tensor) -> str:
    return current_backend(inputs[0], unsupported_dtypes(A, *inputs))
