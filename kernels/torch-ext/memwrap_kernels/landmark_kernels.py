"""Triton kernels of Landmark attention: a softmax of two levels, forward and backward.

A section holds `M` tokens and, last, its landmark: `M + 1` positions. A query in section c at
position p weighs the keys j <= p of its own section, and the landmarks l_s of earlier sections,
by one softmax (with the log-sum-exp L); the weight of an earlier landmark is shared out over the
tokens of its section by a softmax of their own:

    P_j = exp(x_j - L)                  own section         dx_j = P_j (dout v_j - delta)
    P_j = exp(l_s - L) softmax_s(x)_j   section s < c       dx_j = P_j (dout v_j - N_s)
    N_s = sum_j softmax_s(x)_j dout v_j                     dl_s = exp(l_s - L) (N_s - delta)

with `delta = dout out - dL`. Own landmarks are never seen and no landmark's value is used. Both
kinds share one formula a tile of keys: `P = exp(x - max) f` with f constant over a row. A section
that is wider than a tile is walked twice: its inner sums must be known before it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import dot


@triton.jit
def _tile(base, j, real, step, D: tl.constexpr, BD: tl.constexpr):
    """Load rows j of a matrix: `(len(j), BD)`, 0 outside."""
    i_d = tl.arange(0, BD)
    valid = real[:, None] & (i_d < D)[None, :]
    return tl.load(base + j[:, None] * step + i_d[None, :], mask=valid, other=0.0)


@triton.jit
def _scores(
    q, keys, n, j, end, last, flags, start, scale, M: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute scores in powers of two, and which of them the queries see (never a landmark)."""
    x = dot(q, tl.trans(keys), PRECISION) * scale
    seen = (n < M)[None, :]
    if DIAGONAL:
        seen = seen & (j[None, :] <= last[:, None])
    if HAS_STARTS:
        seen = seen & (j[None, :] >= start[:, None])
    if HAS_VALID:
        seen = seen & (tl.load(flags + j, mask=j < end, other=0) != 0)[None, :]
    return x, tl.where(seen, x, -float("inf"))


@triton.jit
def _weights(x, most):
    """Compute `exp(x - most)`; rows that see nothing have `most = -inf` and get zeros."""
    return tl.exp2(x - tl.where(most == -float("inf"), 0.0, most)[:, None])


@triton.jit
def _mark(k, j0, end, k_t, D: tl.constexpr, BD: tl.constexpr):
    """Return a landmark's key as a tile of 16 rows, the others 0: where it has no place beside
    others."""
    i = tl.arange(0, 16)
    return _tile(k, j0 + i, (i == 0) & (j0 + i < end), k_t, D, BD)


@triton.jit
def _column(x):
    """Return a vector as the first of 16 columns."""
    return tl.where((tl.arange(0, 16) == 0)[None, :], x[:, None], 0.0)


@triton.jit
def _landmark(
    q, k, score, inner, j0, end, p, last, flags, start, k_t, scale, M: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the scores of the landmark of the section at j0; -inf where it is not an earlier one,
    or has no token that is seen (a sum of weights `inner` of 0). JOINED: they are known."""
    if not JOINED:
        mark = _mark(k, j0 + M, end, k_t, D, BD)
        score = tl.sum(dot(q, tl.trans(mark), PRECISION), 1) * scale
    if DIAGONAL:
        score = tl.where(p > j0 + M, score, -float("inf"))
    if HAS_STARTS:
        score = tl.where(start <= j0 + M, score, -float("inf"))
    if HAS_VALID:
        real = tl.load(flags + j0 + M, mask=j0 + M < end, other=0) != 0
        score = tl.where(real & (inner > 0.0), score, -float("inf"))
    return score


@triton.jit
def _inner(
    q, dout, k, v, j0, end, p, last, flags, start, k_t, v_t, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Go over all tiles of a section: compute the largest score, the sum of weights, the score of
    the landmark if JOINED and, for GRADS, the sum of weights times `dout v`."""
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    product = tl.zeros([BM], tl.float32)
    mark = tl.zeros([BM], tl.float32)
    for first in range(0, M, BN):
        n = first + tl.arange(0, BN)
        j = j0 + n
        real = (n < M + JOINED) & (j < end)
        keys = _tile(k, j, real, k_t, D, BD)
        raw, x = _scores(
            q, keys, n, j, end, last, flags, start, scale, M, DIAGONAL, HAS_STARTS, HAS_VALID,
            PRECISION,
        )  # fmt: skip
        new = tl.maximum(most, tl.max(x, 1))
        decay = tl.exp2(most - tl.where(new == -float("inf"), 0.0, new))
        weights = _weights(x, new)
        total = total * decay + tl.sum(weights, 1)
        if GRADS:
            values = _tile(v, j, real, v_t, D, BD)
            dp = dot(dout, tl.trans(values), PRECISION)
            product = product * decay + tl.sum(weights * dp, 1)
        if JOINED:
            mark += tl.sum(tl.where((n == M)[None, :], raw, 0.0), 1)
        most = new
    return most, total, mark, product


@triton.jit
def _weighed(
    total, x, most, factor, v, j, real, v_t,
    D: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile's weighted values to the sums."""
    weights = _weights(x, most) * factor[:, None]
    values = _tile(v, j, real, v_t, D, BD)
    return total + dot(weights.to(values.dtype), values, PRECISION)


@triton.jit
def _forward_section(
    q, k, v, j0, end, p, last, flags, start, k_t, v_t, scale, total, top, mass,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a section to the sums of the outer softmax."""
    n = tl.arange(0, BN)
    j = j0 + n
    real = (n < M + JOINED) & (j < end)
    keys = _tile(k, j, real, k_t, D, BD)
    raw, x = _scores(
        q, keys, n, j, end, last, flags, start, scale, M, DIAGONAL, HAS_STARTS, HAS_VALID,
        PRECISION,
    )  # fmt: skip
    if M > BN:
        most, inner, value, _unused = _inner(
            q, q, k, v, j0, end, p, last, flags, start, k_t, v_t, scale, M, D, BD, BM, BN, JOINED,
            DIAGONAL,
            HAS_STARTS, HAS_VALID, False, PRECISION,
        )  # fmt: skip
    else:
        most = tl.max(x, 1)
        inner = tl.sum(_weights(x, most), 1)
        value = tl.sum(tl.where((n == M)[None, :], raw, 0.0), 1)
    value = _landmark(
        q, k, value, inner, j0, end, p, last, flags, start, k_t, scale, M, D, BD, JOINED, DIAGONAL,
        HAS_STARTS, HAS_VALID,
        PRECISION,
    )  # fmt: skip
    divisor = tl.where(inner == 0.0, 1.0, inner)
    factor = 1.0 / divisor
    if DIAGONAL:
        own_section = p <= j0 + M
        value = tl.where(own_section, most, value)
        factor = tl.where(own_section, 1.0, factor)
    new = tl.maximum(top, value)
    safe = tl.where(new == -float("inf"), 0.0, new)
    decay, share = tl.exp2(top - safe), tl.exp2(value - safe)
    gained = share
    if DIAGONAL:
        gained = tl.where(own_section, share * inner, share)
    mass = mass * decay + gained
    total = total * decay[:, None]
    factor = factor * share
    if M > BN:
        for first in range(0, M, BN):
            n = first + tl.arange(0, BN)
            j = j0 + n
            real = (n < M) & (j < end)
            keys = _tile(k, j, real, k_t, D, BD)
            _, x = _scores(
                q, keys, n, j, end, last, flags, start, scale, M, DIAGONAL, HAS_STARTS, HAS_VALID,
                PRECISION,
            )  # fmt: skip
            total = _weighed(total, x, most, factor, v, j, real, v_t, D, BD, PRECISION)
    else:
        total = _weighed(total, x, most, factor, v, j, real, v_t, D, BD, PRECISION)
    return total, new, mass


@triton.jit
def _positions(
    places, lasts, starts, at, real, p, tokens, PLACED: tl.constexpr, HAS_STARTS: tl.constexpr
):
    """Load, of some queries, position, last and first position that they may see."""
    last = p
    if PLACED:
        p = tl.load(places + at, mask=real, other=0).to(tl.int64)
        last = tl.load(lasts + at, mask=real, other=0).to(tl.int64)
    start = p
    if HAS_STARTS:
        start = tl.load(starts + at, mask=real, other=tokens).to(tl.int64)
    return p, last, start


@triton.jit
def forward_kernel(
    q, k, v, places, lasts, starts, valid, out, lse,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, queries, tokens, heads, group, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, PLACED: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend for a tile of queries of one head: the output and the log-sum-exp of the outer
    softmax."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    readers = heads * group
    row = (tl.program_id(1) // readers).to(tl.int64)
    reader = (tl.program_id(1) % readers).to(tl.int64)
    own_k, own_v = k + row * k_b + (reader // group) * k_h, v + row * v_b + (reader // group) * v_h
    t = tile.to(tl.int64) * BM + tl.arange(0, BM)
    real = t < queries
    p = tokens - queries + t
    query = _tile(q + row * q_b + reader * q_h, t, real, q_t, D, BD)
    p, last, start = _positions(
        places, lasts, starts, row * queries + t, real, p, tokens, PLACED, HAS_STARTS
    )
    first = tl.full([], 0, tl.int64)
    if HAS_STARTS:
        first = tl.minimum(tl.min(start, 0), tokens) // (M + 1)
    middle = tl.min(tl.where(real, p, tokens), 0) // (M + 1)
    stop = tl.max(tl.where(real, p, 0), 0) // (M + 1) + 1
    flags = valid + row * tokens
    total = tl.zeros([BM, BD], tl.float32)
    mass = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    for section in range(first, middle):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total, top, mass = _forward_section(
            query, own_k, own_v, j0, tokens, p, last, flags, start, k_t, v_t, scale, total, top,
            mass,
            M, D, BD, BM, BN, JOINED, False, HAS_STARTS, HAS_VALID, PRECISION,
        )  # fmt: skip
    for section in range(tl.maximum(first, middle), stop):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total, top, mass = _forward_section(
            query, own_k, own_v, j0, tokens, p, last, flags, start, k_t, v_t, scale, total, top,
            mass,
            M, D, BD, BM, BN, JOINED, True, HAS_STARTS, HAS_VALID, PRECISION,
        )  # fmt: skip
    seen = mass > 0.0
    total = total / tl.where(seen, mass, 1.0)[:, None]
    place = (row * readers + reader) * queries + t
    i_d = tl.arange(0, BD)
    tl.store(
        out + place[:, None] * D + i_d[None, :], total.to(out.dtype.element_ty),
        mask=real[:, None] & (i_d < D)[None, :],
    )  # fmt: skip
    logsumexp = (top + tl.log2(tl.where(seen, mass, 1.0))) * 0.6931471805599453
    tl.store(lse + place, tl.where(seen, logsumexp, -float("inf")), mask=real)
