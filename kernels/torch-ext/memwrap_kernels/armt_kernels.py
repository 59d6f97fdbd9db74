"""Triton kernels of the associative memory (ARMT): DPFP features are made inside the kernels.

With `u = [relu(x), relu(-x)]` of width 2 D, feature f of a token is `u[i] u[i - j]` where
`i = f mod 2D`, `j = f div 2D + 1`, indices modulo 2D; there are `K = 2 nu D` of them, r times
as large where they are normalised (`r = 1 / |features|`). `phi` below is `r f`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _half(at, i, valid, D: tl.constexpr):
    """Return u at indices `i` of the rows that start at `at` (T, 1): `(T, len(i))`, in float32."""
    x = tl.load(at + (i % D)[None, :], mask=valid, other=0.0).to(tl.float32)
    return tl.maximum(tl.where((i < D)[None, :], x, -x), 0.0)


@triton.jit
def _features(at, f, real, D: tl.constexpr, NU: tl.constexpr):
    """Compute features `f` of some rows: `(T, len(f))`, 0 outside."""
    valid = real[:, None] & (f < 2 * NU * D)[None, :]
    i, j = f % (2 * D), f // (2 * D) + 1
    return _half(at, i, valid, D) * _half(at, (i + 2 * NU * D - j) % (2 * D), valid, D)


@triton.jit
def read_kernel(
    x, a, z, out, scales, denominators, squares,
    x_b, x_h, x_t, tokens, heads, eps,
    D: tl.constexpr, NU: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, HAS_Z: tl.constexpr, NORMALIZE: tl.constexpr, STATS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out = phi A / (phi z + eps)`; STATS keeps r, the denominators and `|phi|^2`."""
    K: tl.constexpr = 2 * NU * D
    blocks: tl.constexpr = (DV + BV - 1) // BV
    tile, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    memory = tl.program_id(1).to(tl.int64)
    t = tile * BT + tl.arange(0, BT)
    real = t < tokens
    at = x + (memory // heads) * x_b + (memory % heads) * x_h + t[:, None] * x_t
    i_v = block * BV + tl.arange(0, BV)
    total = tl.zeros([BT, BV], tl.float32)
    squared = tl.zeros([BT], tl.float32)
    divisor = tl.zeros([BT], tl.float32)
    for first in range(0, K, BF):
        f = first + tl.arange(0, BF)
        phi = _features(at, f, real, D, NU)
        matrix = tl.load(
            a + (memory * K + f[:, None]) * DV + i_v[None, :],
            mask=(f < K)[:, None] & (i_v < DV)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.dot(phi, matrix, input_precision=PRECISION)
        squared += tl.sum(phi * phi, 1)
        if HAS_Z:
            own_z = tl.load(z + memory * K + f, mask=f < K, other=0.0)
            divisor += tl.sum(phi * own_z[None, :], 1)
    scale = tl.full([BT], 1.0, tl.float32)
    if NORMALIZE:
        scale = 1.0 / tl.maximum(tl.sqrt(squared), 1e-12)
    total = total * scale[:, None]
    denominator = tl.full([BT], 1.0, tl.float32)
    if HAS_Z:
        denominator = divisor * scale + eps
        total = total / denominator[:, None]
    place = memory * tokens + t
    valid = real[:, None] & (i_v < DV)[None, :]
    tl.store(out + place[:, None] * DV + i_v[None, :], total, mask=valid)
    if STATS:
        once = t + block * tokens < tokens  # by the first of the blocks of values
        tl.store(scales + place, scale, mask=once)
        tl.store(denominators + place, denominator, mask=once)
        tl.store(squares + place, squared * scale * scale, mask=once)


@triton.jit
def project_kernel(
    y, a, out, y_b, y_h, y_t, tokens, heads,
    K: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out = y A^T`: `(T, V)` with `(K, V)` gives `(T, K)`."""
    blocks: tl.constexpr = (K + BF - 1) // BF
    tile, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    memory = tl.program_id(1).to(tl.int64)
    t, f = tile * BT + tl.arange(0, BT), block * BF + tl.arange(0, BF)
    at = y + (memory // heads) * y_b + (memory % heads) * y_h + t[:, None] * y_t
    total = tl.zeros([BT, BF], tl.float32)
    for first in range(0, DV, BV):
        i_v = first + tl.arange(0, BV)
        valid = (t < tokens)[:, None] & (i_v < DV)[None, :]
        value = tl.load(at + i_v[None, :], mask=valid, other=0.0).to(tl.float32)
        matrix = tl.load(
            a + (memory * K + f[None, :]) * DV + i_v[:, None],
            mask=(f < K)[None, :] & (i_v < DV)[:, None], other=0.0,
        )  # fmt: skip
        total += tl.dot(value, matrix, input_precision=PRECISION)
    place = memory * tokens + t
    valid = (t < tokens)[:, None] & (f < K)[None, :]
    tl.store(out + place[:, None] * K + f[None, :], total, mask=valid)


@triton.jit
def write_kernel(
    x, y, weights, weights_z, a, z, out, out_z,
    x_b, x_h, x_t, y_b, y_h, y_t, tokens, heads,
    D: tl.constexpr, NU: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    BV: tl.constexpr, HAS_BASE: tl.constexpr, HAS_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out = [A +] sum_t f_t^T w_t y_t` and `out_z = [z +] sum_t w'_t f_t`."""
    K: tl.constexpr = 2 * NU * D
    blocks: tl.constexpr = (DV + BV - 1) // BV
    memory = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) % blocks
    f = (tl.program_id(0) // blocks) * BF + tl.arange(0, BF)
    i_v = block * BV + tl.arange(0, BV)
    row, head = memory // heads, memory % heads
    total = tl.zeros([BF, BV], tl.float32)
    total_z = tl.zeros([BF], tl.float32)
    for first in range(0, tokens, BT):
        t = tl.full([], 0, tl.int64) + first + tl.arange(0, BT)
        real = t < tokens
        phi = _features(x + row * x_b + head * x_h + t[:, None] * x_t, f, real, D, NU)
        at = y + row * y_b + head * y_h + t[:, None] * y_t + i_v[None, :]
        value = tl.load(at, mask=real[:, None] & (i_v < DV)[None, :], other=0.0).to(tl.float32)
        weight = tl.load(weights + memory * tokens + t, mask=real, other=0.0)
        total += tl.dot(tl.trans(phi), value * weight[:, None], input_precision=PRECISION)
        if HAS_Z:
            weight_z = tl.load(weights_z + memory * tokens + t, mask=real, other=0.0)
            total_z += tl.sum(phi * weight_z[:, None], 0)
    offsets = (memory * K + f[:, None]) * DV + i_v[None, :]
    valid = (f < K)[:, None] & (i_v < DV)[None, :]
    if HAS_BASE:
        total += tl.load(a + offsets, mask=valid, other=0.0)
    tl.store(out + offsets, total, mask=valid)
    if HAS_Z:
        once = f + block * K < K  # by the first of the blocks of values
        if HAS_BASE:
            total_z += tl.load(z + memory * K + f, mask=once, other=0.0)
        tl.store(out_z + memory * K + f, total_z, mask=once)


@triton.jit
def _gradient(
    at, p, z, e, b, j, valid, part, share, gamma, scale, inner,
    D: tl.constexpr, NU: tl.constexpr, HAS_Z: tl.constexpr, HAS_E: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the features `u[b] u[b - j]`: `(T, len(b))`."""
    f = (j - 1) * 2 * D + b
    gradient = tl.load(p + f[None, :], mask=valid, other=0.0) * part[:, None]
    if HAS_Z:
        gradient += share[:, None] * tl.load(z + f)[None, :]
    if HAS_E:
        gradient += gamma[:, None] * tl.load(e + f)[None, :]
    if NORMALIZE:
        phi = _half(at, b, valid, D) * _half(at, (b + 2 * NU * D - j) % (2 * D), valid, D)
        gradient = scale[:, None] * (gradient - phi * (scale * inner)[:, None])
    return gradient


@triton.jit
def _half_gradient(
    at, p, z, e, i, valid, part, share, gamma, scale, inner,
    D: tl.constexpr, NU: tl.constexpr, HAS_Z: tl.constexpr, HAS_E: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of u at indices `i`: each u is the left factor of nu features and the
    right one of nu others."""
    total = tl.zeros_like(_half(at, i, valid, D))
    for j in tl.static_range(1, NU + 1):
        before, after = (i + 2 * NU * D - j) % (2 * D), (i + j) % (2 * D)
        left = _gradient(
            at, p, z, e, i, j, valid, part, share, gamma, scale, inner, D, NU, HAS_Z, HAS_E,
            NORMALIZE,
        )  # fmt: skip
        right = _gradient(
            at, p, z, e, after, j, valid, part, share, gamma, scale, inner, D, NU, HAS_Z, HAS_E,
            NORMALIZE,
        )  # fmt: skip
        total += left * _half(at, before, valid, D) + right * _half(at, after, valid, D)
    return total


@triton.jit
def features_bwd_kernel(
    x, p, z, e, shares, gammas, dx, weights, weights_z,
    x_b, x_h, x_t, tokens, heads, eps,
    D: tl.constexpr, NU: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_E: tl.constexpr, NORMALIZE: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Turn gradients of features into those of x.

    The gradient of phi is `P / d + s z` for a read, with `d = phi z + eps` and
    `s = -(phi P) / d^2`; the weights `r / d` and `r s` of each token are kept, for the gradients
    of A and z. For a write it is `P + s z + gamma e`, with s and gamma given.
    """
    K: tl.constexpr = 2 * NU * D
    memory = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    real = t < tokens
    at = x + (memory // heads) * x_b + (memory % heads) * x_h + t[:, None] * x_t
    place = memory * tokens + t
    at_p, at_z, at_e = p + place[:, None] * K, z + memory * K, e + memory * K
    squared = tl.zeros([BT], tl.float32)
    by_p, by_z, by_e = squared, squared, squared
    for first in range(0, K, BF):
        f = first + tl.arange(0, BF)
        phi = _features(at, f, real, D, NU)
        chosen = real[:, None] & (f < K)[None, :]
        squared += tl.sum(phi * phi, 1)
        by_p += tl.sum(phi * tl.load(at_p + f[None, :], mask=chosen, other=0.0), 1)
        if HAS_Z:
            by_z += tl.sum(phi * tl.load(at_z + f, mask=f < K, other=0.0)[None, :], 1)
        if HAS_E:
            by_e += tl.sum(phi * tl.load(at_e + f, mask=f < K, other=0.0)[None, :], 1)
    scale = tl.full([BT], 1.0, tl.float32)
    if NORMALIZE:
        scale = 1.0 / tl.maximum(tl.sqrt(squared), 1e-12)
    part = tl.full([BT], 1.0, tl.float32)
    share = tl.zeros([BT], tl.float32)
    gamma = tl.zeros([BT], tl.float32)
    if READ:
        if HAS_Z:
            part = 1.0 / (scale * by_z + eps)
            share = -scale * by_p * part * part
            tl.store(weights_z + place, share * scale, mask=real)
        tl.store(weights + place, part * scale, mask=real)
    else:
        if HAS_Z:
            share = tl.load(shares + place, mask=real, other=0.0)
        if HAS_E:
            gamma = tl.load(gammas + place, mask=real, other=0.0)
    # phi times its own gradient; nothing where the norm is clamped and no longer divides.
    inner = scale * (part * by_p + share * by_z + gamma * by_e)
    inner = tl.where(tl.sqrt(squared) > 1e-12, inner, 0.0)
    for first in range(0, D, BD):
        i = first + tl.arange(0, BD)
        valid = real[:, None] & (i < D)[None, :]
        i = tl.minimum(i, D - 1)
        above = _half_gradient(
            at, at_p, at_z, at_e, i, valid, part, share, gamma, scale, inner, D, NU, HAS_Z,
            HAS_E, NORMALIZE,
        )  # fmt: skip
        below = _half_gradient(
            at, at_p, at_z, at_e, i + D, valid, part, share, gamma, scale, inner, D, NU, HAS_Z,
            HAS_E, NORMALIZE,
        )  # fmt: skip
        value = tl.load(at + i[None, :], mask=valid, other=0.0).to(tl.float32)
        gradient = tl.where(value > 0, above, 0.0) - tl.where(value < 0, below, 0.0)
        chosen = dx + place[:, None] * D + i[None, :]
        tl.store(chosen, gradient.to(dx.dtype.element_ty), mask=valid)
