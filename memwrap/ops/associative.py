"""The associative memory of ARMT: DPFP features, reading, writing.

Rodkin et al., "Associative Recurrent Memory Transformer" (2024), section 3. One matrix A
maps key features to values, z normalises it. Shapes: B batch, H heads, T queries, M written
tokens, K features a key, V value channels. A is `(B, H, K, V)`, z is `(B, H, K)`.

The sums are kept in float32 (float64 for float64 inputs) whatever the inputs' dtype.
`read_projected` and `write_projected` take queries and keys before the feature map, of width D
with `K = 2 nu D`: the kernels make the features themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend, unsupported_dtypes

EPS = 1e-5
__all__ = [
    "EPS", "accumulation_dtype", "dpfp", "features", "read", "read_projected", "write",
    "write_projected",
]  # fmt: skip


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, eq. 37).

    With `u = [relu(x), relu(-x)]`, the features are `u * roll(u, j)` for `j = 1..nu`.

    Args:
        x: `(..., d)`.
        nu: number of rolls.

    Returns:
        `(..., 2 * nu * d)`, non-negative.
    """
    u = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
    return torch.cat([u * u.roll(j, dims=-1) for j in range(1, nu + 1)], dim=-1)


def features(x: Tensor, nu: int, normalize: bool) -> Tensor:
    """DPFP in the accumulation dtype; `normalize` divides by the L2 norm (the later code)."""
    phi = dpfp(x.to(accumulation_dtype(x)), nu)
    return F.normalize(phi, dim=-1) if normalize else phi


def read(q: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
    """Read the memory: `q A / (q z + eps)`, or `q A` if `z` is None.

    Args:
        q: query features `(B, H, T, K)`.
        A: `(B, H, K, V)`.
        z: `(B, H, K)` or None (no denominator).

    Returns:
        `(B, H, T, V)`.
    """
    return (_read_naive if current_backend() == "naive" else _read_chunked)(q.to(A.dtype), A, z)


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
    function = _write_naive if current_backend() == "naive" else _write_chunked
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


def _read_chunked(q: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
    out = q @ A
    return out if z is None else out / ((q @ z.unsqueeze(-1)) + EPS)


def _write_chunked(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    z: Tensor | None,
    written: Tensor,
    correction: bool,
    key_eps: float,
) -> tuple[Tensor, Tensor | None]:
    first = ~written.view(-1, 1, 1, 1)
    previous = k @ A
    if z is None:
        previous = previous.masked_fill(first, 0.0)
        return A + k.transpose(-1, -2) @ (beta * (v - previous)), None
    denominator = k @ z.unsqueeze(-1) + EPS
    previous = (previous / denominator).masked_fill(first, 0.0)
    gamma = torch.ones_like(denominator)
    if correction:
        squared = (k * k).sum(-1, keepdim=True) + key_eps
        # A key without features has no direction to correct: 0/0 would be NaN.
        ratio = torch.where(squared > 0, denominator / squared.clamp_min(1e-38), 1.0)
        gamma = (1 - ratio).clamp(0, 1).masked_fill(first, 1.0).detach()
    new_z = z + (gamma * k).sum(-2)
    return A + k.transpose(-1, -2) @ (beta * (v - previous)), new_z


def _read_naive(q: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
    out = torch.zeros(*q.shape[:-1], A.shape[-1], dtype=A.dtype, device=A.device)
    rows = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            tokens = []
            for t in range(q.shape[2]):
                value = (q[b, h, t, :, None] * A[b, h]).sum(0)
                if z is not None:
                    value = value / ((q[b, h, t] * z[b, h]).sum() + EPS)
                tokens.append(value)
            heads.append(torch.stack(tokens) if tokens else out[b, h])
        rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else out


def _write_naive(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    z: Tensor | None,
    written: Tensor,
    correction: bool,
    key_eps: float,
) -> tuple[Tensor, Tensor | None]:
    beta = beta.expand_as(v)
    new_A, new_z = A.clone(), None if z is None else z.clone()
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            for i in range(k.shape[2]):
                key, previous, gamma = k[b, h, i], torch.zeros_like(v[b, h, i]), 1.0
                if written[b]:
                    previous = (key[:, None] * A[b, h]).sum(0)
                    if z is not None:
                        denominator = (key * z[b, h]).sum() + EPS
                        previous = previous / denominator
                        squared = float((key * key).sum().detach()) + key_eps
                        if correction:
                            ratio = float(denominator.detach()) / squared if squared > 0 else 1.0
                            gamma = min(max(1 - ratio, 0.0), 1.0)
                change = torch.outer(key, beta[b, h, i] * (v[b, h, i] - previous))
                new_A = new_A.index_put((torch.tensor(b), torch.tensor(h)), new_A[b, h] + change)
                if new_z is not None:
                    new_z = new_z.index_put(
                        (torch.tensor(b), torch.tensor(h)), new_z[b, h] + gamma * key
                    )
    return new_A, new_z
