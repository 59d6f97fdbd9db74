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

from memwrap_kernels.products import dot


@triton.jit
def _tile(base, j, real, step, D: tl.constexpr, BD: tl.constexpr):
    """Rows j of a matrix: `(len(j), BD)`, 0 outside."""
    i_d = tl.arange(0, BD)
    valid = real[:, None] & (i_d < D)[None, :]
    return tl.load(base + j[:, None] * step + i_d[None, :], mask=valid, other=0.0)


@triton.jit
def _scores(
    q, keys, n, j, p, start, scale, M: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in powers of two, and which of them the queries see (never a landmark)."""
    x = dot(q, tl.trans(keys), PRECISION) * scale
    seen = (n < M)[None, :]
    if DIAGONAL:
        seen = seen & (j[None, :] <= p[:, None])
    if HAS_STARTS:
        seen = seen & (j[None, :] >= start[:, None])
    return x, tl.where(seen, x, -float("inf"))


@triton.jit
def _weights(x, most):
    """`exp(x - most)`; rows that see nothing have `most = -inf` and get zeros."""
    return tl.exp2(x - tl.where(most == -float("inf"), 0.0, most)[:, None])


@triton.jit
def _mark(k, j0, end, k_t, D: tl.constexpr, BD: tl.constexpr):
    """A landmark's key as a tile of 16 rows, the others 0: where it has no place beside others."""
    i = tl.arange(0, 16)
    return _tile(k, j0 + i, (i == 0) & (j0 < end), k_t, D, BD)


@triton.jit
def _column(x):
    """A vector as the first of 16 columns."""
    return tl.where((tl.arange(0, 16) == 0)[None, :], x[:, None], 0.0)


@triton.jit
def _landmark(
    q, k, own, j0, end, p, start, k_t, scale, M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the landmark of the section at j0; -inf where it is not an earlier one. JOINED:
    they are known."""
    if not JOINED:
        mark = _mark(k, j0 + M, end, k_t, D, BD)
        own = tl.sum(dot(q, tl.trans(mark), PRECISION), 1) * scale
    if DIAGONAL:
        own = tl.where(p > j0 + M, own, -float("inf"))
    if HAS_STARTS:
        own = tl.where(start <= j0 + M, own, -float("inf"))
    return own


@triton.jit
def _inner(
    q, dout, k, v, j0, end, p, start, k_t, v_t, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr, GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Over all tiles of a section: the largest score, the sum of weights, the score of the
    landmark if JOINED and, for GRADS, the sum of weights times `dout v`."""
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    product = tl.zeros([BM], tl.float32)
    mark = tl.zeros([BM], tl.float32)
    for first in range(0, M, BN):
        n = first + tl.arange(0, BN)
        j = j0 + n
        real = (n < M + JOINED) & (j < end)
        keys = _tile(k, j, real, k_t, D, BD)
        raw, x = _scores(q, keys, n, j, p, start, scale, M, DIAGONAL, HAS_STARTS, PRECISION)
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
def _forward_section(
    q, k, v, j0, end, p, start, k_t, v_t, scale, total, top, mass,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a section to the sums of the outer softmax."""
    n = tl.arange(0, BN)
    j = j0 + n
    real = (n < M + JOINED) & (j < end)
    keys = _tile(k, j, real, k_t, D, BD)
    raw, x = _scores(q, keys, n, j, p, start, scale, M, DIAGONAL, HAS_STARTS, PRECISION)
    if M > BN:
        most, inner, value, unused = _inner(
            q, q, k, v, j0, end, p, start, k_t, v_t, scale, M, D, BD, BM, BN, JOINED, DIAGONAL,
            HAS_STARTS, False, PRECISION,
        )  # fmt: skip
    else:
        most = tl.max(x, 1)
        inner = tl.sum(_weights(x, most), 1)
        value = tl.sum(tl.where((n == M)[None, :], raw, 0.0), 1)
    value = _landmark(
        q, k, value, j0, end, p, start, k_t, scale, M, D, BD, JOINED, DIAGONAL, HAS_STARTS,
        PRECISION,
    )  # fmt: skip
    divisor = tl.where(inner == 0.0, 1.0, inner)
    factor = 1.0 / divisor
    if DIAGONAL:
        own = p <= j0 + M
        value = tl.where(own, most, value)
        factor = tl.where(own, 1.0, factor)
    new = tl.maximum(top, value)
    safe = tl.where(new == -float("inf"), 0.0, new)
    decay, share = tl.exp2(top - safe), tl.exp2(value - safe)
    if DIAGONAL:
        mass = mass * decay + tl.where(own, share * inner, share)
    else:
        mass = mass * decay + share
    total = total * decay[:, None]
    factor = factor * share
    if M > BN:
        for first in range(0, M, BN):
            n = first + tl.arange(0, BN)
            j = j0 + n
            real = (n < M) & (j < end)
            keys = _tile(k, j, real, k_t, D, BD)
            _, x = _scores(q, keys, n, j, p, start, scale, M, DIAGONAL, HAS_STARTS, PRECISION)
            weights = _weights(x, most) * factor[:, None]
            values = _tile(v, j, real, v_t, D, BD)
            total += dot(weights.to(values.dtype), values, PRECISION)
    else:
        weights = _weights(x, most) * factor[:, None]
        values = _tile(v, j, real, v_t, D, BD)
        total += dot(weights.to(values.dtype), values, PRECISION)
    return total, new, mass


@triton.jit
def forward_kernel(
    q, k, v, starts, out, lse,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, queries, tokens, heads, group, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: the output and the log-sum-exp of the outer softmax."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    readers = heads * group
    row = (tl.program_id(1) // readers).to(tl.int64)
    reader = (tl.program_id(1) % readers).to(tl.int64)
    own_k, own_v = k + row * k_b + (reader // group) * k_h, v + row * v_b + (reader // group) * v_h
    t = tile.to(tl.int64) * BM + tl.arange(0, BM)
    real = t < queries
    p = tokens - queries + t
    query = _tile(q + row * q_b + reader * q_h, t, real, q_t, D, BD)
    start = p
    first = tl.full([], 0, tl.int64)
    if HAS_STARTS:
        start = tl.load(starts + row * queries + t, mask=real, other=tokens).to(tl.int64)
        first = tl.minimum(tl.min(start, 0), tokens) // (M + 1)
    total = tl.zeros([BM, BD], tl.float32)
    mass = tl.zeros([BM], tl.float32)
    top = tl.full([BM], -float("inf"), tl.float32)
    middle = (tokens - queries + tile * BM) // (M + 1)
    last = (tl.minimum(tokens - queries + tile * BM + BM, tokens) - 1) // (M + 1) + 1
    for section in range(first, middle):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total, top, mass = _forward_section(
            query, own_k, own_v, j0, tokens, p, start, k_t, v_t, scale, total, top, mass,
            M, D, BD, BM, BN, JOINED, False, HAS_STARTS, PRECISION,
        )  # fmt: skip
    for section in range(tl.maximum(first, middle), last):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total, top, mass = _forward_section(
            query, own_k, own_v, j0, tokens, p, start, k_t, v_t, scale, total, top, mass,
            M, D, BD, BM, BN, JOINED, True, HAS_STARTS, PRECISION,
        )  # fmt: skip
    seen = mass > 0.0
    total = total / tl.where(seen, mass, 1.0)[:, None]
    place = (row * readers + reader) * queries + t
    i_d = tl.arange(0, BD)
    tl.store(
        out + place[:, None] * D + i_d[None, :], total.to(out.dtype.element_ty),
        mask=real[:, None] & (i_d < D)[None, :],
    )  # fmt: skip
    found = (top + tl.log2(tl.where(seen, mass, 1.0))) * 0.6931471805599453
    tl.store(lse + place, tl.where(seen, found, -float("inf")), mask=real)


@triton.jit
def _gradients(
    q, dout, k, v, x, raw, n, j, j0, end, real, values, p, start, level, delta, k_t, v_t, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one section: the factor f and constant c of `dx = exp(x - most) f (dout v - c)`, the
    largest scores, the gradient of the landmark's scores; and `dout v` of the tile at hand."""
    dp = dot(dout, tl.trans(values), PRECISION)
    if M > BN:
        most, inner, value, product = _inner(
            q, dout, k, v, j0, end, p, start, k_t, v_t, scale, M, D, BD, BM, BN, JOINED, DIAGONAL,
            HAS_STARTS, True, PRECISION,
        )  # fmt: skip
    else:
        most = tl.max(x, 1)
        weights = _weights(x, most)
        inner = tl.sum(weights, 1)
        product = tl.sum(weights * dp, 1)
        value = tl.sum(tl.where((n == M)[None, :], raw, 0.0), 1)
    value = _landmark(
        q, k, value, j0, end, p, start, k_t, scale, M, D, BD, JOINED, DIAGONAL, HAS_STARTS,
        PRECISION,
    )  # fmt: skip
    constant = product / tl.where(inner == 0.0, 1.0, inner)
    if DIAGONAL:
        own = p <= j0 + M
        gate = tl.exp2(tl.where(own, most, value) - level)
        by_landmark = tl.where(own, 0.0, gate * (constant - delta))
        factor = gate / tl.where(own | (inner == 0.0), 1.0, inner)
        constant = tl.where(own, delta, constant)
    else:
        gate = tl.exp2(value - level)
        by_landmark = gate * (constant - delta)
        factor = gate / tl.where(inner == 0.0, 1.0, inner)
    return dp, most, factor, constant, by_landmark


@triton.jit
def _level(lse, place, real):
    """Log-sum-exps in powers of two; +inf, so that all weights are 0, where nothing was seen."""
    found = tl.load(lse + place, mask=real, other=-float("inf"))
    return tl.where(found == -float("inf"), float("inf"), found * 1.4426950408889634)


@triton.jit
def _query_section(
    q, dout, k, v, j0, end, p, start, level, delta, k_t, v_t, scale, dq,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a section's part to the gradient of a tile of queries."""
    n = tl.arange(0, BN)
    j = j0 + n
    real = (n < M + JOINED) & (j < end)
    keys = _tile(k, j, real, k_t, D, BD)
    values = _tile(v, j, real, v_t, D, BD)
    raw, x = _scores(q, keys, n, j, p, start, scale, M, DIAGONAL, HAS_STARTS, PRECISION)
    dp, most, factor, constant, by_landmark = _gradients(
        q, dout, k, v, x, raw, n, j, j0, end, real, values, p, start, level, delta, k_t, v_t,
        scale, M, D, BD, BM, BN, JOINED, DIAGONAL, HAS_STARTS, PRECISION,
    )  # fmt: skip
    dx = _weights(x, most) * factor[:, None] * (dp - constant[:, None])
    if JOINED:
        dx = tl.where((n == M)[None, :], by_landmark[:, None], dx)
    else:
        mark = _mark(k, j0 + M, end, k_t, D, BD)
        dq += dot(_column(by_landmark).to(mark.dtype), mark, PRECISION)
    dq += dot(dx.to(keys.dtype), keys, PRECISION)
    for first in range(BN, M, BN):
        n = first + tl.arange(0, BN)
        j = j0 + n
        real = (n < M + JOINED) & (j < end)
        keys = _tile(k, j, real, k_t, D, BD)
        values = _tile(v, j, real, v_t, D, BD)
        _, x = _scores(q, keys, n, j, p, start, scale, M, DIAGONAL, HAS_STARTS, PRECISION)
        dp = dot(dout, tl.trans(values), PRECISION)
        dx = _weights(x, most) * factor[:, None] * (dp - constant[:, None])
        if JOINED:
            dx = tl.where((n == M)[None, :], by_landmark[:, None], dx)
        dq += dot(dx.to(keys.dtype), keys, PRECISION)
    return dq


@triton.jit
def query_bwd_kernel(
    q, k, v, starts, out, lse, dout, dlse, dq, deltas,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, queries, tokens, heads, group,
    scale, plain,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries of one head; keeps delta for the keys' pass."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    readers = heads * group
    row = (tl.program_id(1) // readers).to(tl.int64)
    reader = (tl.program_id(1) % readers).to(tl.int64)
    own_k, own_v = k + row * k_b + (reader // group) * k_h, v + row * v_b + (reader // group) * v_h
    t = tile.to(tl.int64) * BM + tl.arange(0, BM)
    real = t < queries
    p = tokens - queries + t
    place = (row * readers + reader) * queries + t
    query = _tile(q + row * q_b + reader * q_h, t, real, q_t, D, BD)
    grad = _tile(dout + row * d_b + reader * d_h, t, real, d_t, D, BD)
    result = _tile(out, place, real, D, D, BD)
    delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    delta -= tl.load(dlse + place, mask=real, other=0.0)
    tl.store(deltas + place, delta, mask=real)
    level = _level(lse, place, real)
    start = p
    first = tl.full([], 0, tl.int64)
    if HAS_STARTS:
        start = tl.load(starts + row * queries + t, mask=real, other=tokens).to(tl.int64)
        first = tl.minimum(tl.min(start, 0), tokens) // (M + 1)
    total = tl.zeros([BM, BD], tl.float32)
    middle = (tokens - queries + tile * BM) // (M + 1)
    last = (tl.minimum(tokens - queries + tile * BM + BM, tokens) - 1) // (M + 1) + 1
    for section in range(first, middle):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total = _query_section(
            query, grad, own_k, own_v, j0, tokens, p, start, level, delta, k_t, v_t, scale, total,
            M, D, BD, BM, BN, JOINED, False, HAS_STARTS, PRECISION,
        )  # fmt: skip
    for section in range(tl.maximum(first, middle), last):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total = _query_section(
            query, grad, own_k, own_v, j0, tokens, p, start, level, delta, k_t, v_t, scale, total,
            M, D, BD, BM, BN, JOINED, True, HAS_STARTS, PRECISION,
        )  # fmt: skip
    i_d = tl.arange(0, BD)
    tl.store(
        dq + place[:, None] * D + i_d[None, :], (total * plain).to(dq.dtype.element_ty),
        mask=real[:, None] & (i_d < D)[None, :],
    )  # fmt: skip


@triton.jit
def _key_tile(
    q, dout, starts, lse, deltas, k, v, keys, values, n, j, j0, real, row, place, t, queries,
    tokens, q_t, k_t, v_t, d_t, scale, dk, dv, dl,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries' part to the gradients of a tile of keys and values."""
    asked = t < queries
    p = tokens - queries + t
    query = _tile(q, t, asked, q_t, D, BD)
    grad = _tile(dout, t, asked, d_t, D, BD)
    level = _level(lse, place + t, asked)
    delta = tl.load(deltas + place + t, mask=asked, other=0.0)
    start = p
    if HAS_STARTS:
        start = tl.load(starts + row * queries + t, mask=asked, other=tokens).to(tl.int64)
    raw, x = _scores(query, keys, n, j, p, start, scale, M, DIAGONAL, HAS_STARTS, PRECISION)
    dp, most, factor, constant, by_landmark = _gradients(
        query, grad, k, v, x, raw, n, j, j0, tokens, real, values, p, start, level, delta, k_t,
        v_t, scale, M, D, BD, BM, BN, JOINED, DIAGONAL, HAS_STARTS, PRECISION,
    )  # fmt: skip
    weights = _weights(x, most) * factor[:, None]
    dv += dot(tl.trans(weights.to(grad.dtype)), grad, PRECISION)
    dx = weights * (dp - constant[:, None])
    if JOINED:
        dx = tl.where((n == M)[None, :], by_landmark[:, None], dx)
    else:
        dl += dot(tl.trans(_column(by_landmark).to(query.dtype)), query, PRECISION)
    dk += dot(tl.trans(dx.to(query.dtype)), query, PRECISION)
    return dk, dv, dl


@triton.jit
def key_bwd_kernel(
    q, k, v, starts, lse, deltas, dout, dk, dv,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, queries, tokens, heads, group,
    scale, plain,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values of one section, over all queries that see it."""
    parts: tl.constexpr = (M + BN - 1) // BN
    section, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    own_k, own_v = k + row * k_b + head * k_h, v + row * v_b + head * v_h
    j0 = section * (M + 1)
    n = part * BN + tl.arange(0, BN)
    j = j0 + n
    real = (n < M + JOINED) & (j < tokens)
    keys = _tile(own_k, j, real, k_t, D, BD)
    values = _tile(own_v, j, real, v_t, D, BD)
    grad_k = tl.zeros([BN, BD], tl.float32)
    grad_v = tl.zeros([BN, BD], tl.float32)
    grad_l = tl.zeros([16, BD], tl.float32)
    history = tokens - queries
    first = (tl.maximum(j0 - history, 0) // BM).to(tl.int32)
    # Tiles of queries that are all beyond this section need no causal mask.
    after = (tl.maximum(j0 + M + 1 - history, 0) + BM - 1) // BM
    tiles = (queries + BM - 1) // BM
    middle = tl.minimum(after, tiles).to(tl.int32)
    for g in range(0, group):
        reader = head * group + g
        place = (row * heads * group + reader) * queries
        own_q, own_d = q + row * q_b + reader * q_h, dout + row * d_b + reader * d_h
        for tile in range(first, middle):
            t = tl.full([], 0, tl.int64) + tile * BM + tl.arange(0, BM)
            grad_k, grad_v, grad_l = _key_tile(
                own_q, own_d, starts, lse, deltas, own_k, own_v, keys, values, n, j, j0, real,
                row, place, t, queries, tokens, q_t, k_t, v_t, d_t, scale, grad_k, grad_v, grad_l,
                M, D, BD, BM, BN, JOINED, True, HAS_STARTS, PRECISION,
            )  # fmt: skip
        for tile in range(middle, tiles):
            t = tl.full([], 0, tl.int64) + tile * BM + tl.arange(0, BM)
            reached = True
            if HAS_STARTS:
                start = tl.load(starts + row * queries + t, mask=t < queries, other=tokens)
                reached = tl.min(start, 0) <= j0 + M
            if reached:
                grad_k, grad_v, grad_l = _key_tile(
                    own_q, own_d, starts, lse, deltas, own_k, own_v, keys, values, n, j, j0, real,
                    row, place, t, queries, tokens, q_t, k_t, v_t, d_t, scale, grad_k, grad_v,
                    grad_l, M, D, BD, BM, BN, JOINED, False, HAS_STARTS, PRECISION,
                )  # fmt: skip
    i_d = tl.arange(0, BD)
    at = (row * heads + head) * tokens
    here = (at + j[:, None]) * D + i_d[None, :]
    valid = real[:, None] & (i_d < D)[None, :]
    tl.store(dk + here, (grad_k * plain).to(dk.dtype.element_ty), mask=valid)
    tl.store(dv + here, grad_v.to(dv.dtype.element_ty), mask=valid)
    if not JOINED:
        i = tl.arange(0, 16)[:, None]
        here = (at + j0 + M + i) * D + i_d[None, :]
        valid = (i == 0) & (i_d < D)[None, :] & (j0 + M < tokens) & (part == 0)
        tl.store(dk + here, (grad_l * plain).to(dk.dtype.element_ty), mask=valid)
        tl.store(dv + here, tl.zeros([16, BD], tl.float32).to(dv.dtype.element_ty), mask=valid)
