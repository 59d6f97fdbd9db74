"""Triton kernels of the gradients of Landmark attention; formulas in `landmark_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from .landmark_kernels import (
    _column,
    _inner,
    _landmark,
    _mark,
    _positions,
    _scores,
    _tile,
    _weights,
)  # fmt: skip
from .products import dot


@triton.jit
def _gradients(
    q, dout, k, v, x, raw, n, j, j0, end, real, values, p, last, flags, start, level, delta, k_t,
    v_t, scale,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute, of one section, the factor f and constant c of `dx = exp(x - most) f (dout v - c)`,
    the largest scores, the gradient of the landmark's scores; and `dout v` of the tile at hand."""
    dp = dot(dout, tl.trans(values), PRECISION)
    if M > BN:
        most, inner, value, product = _inner(
            q, dout, k, v, j0, end, p, last, flags, start, k_t, v_t, scale, M, D, BD, BM, BN,
            JOINED, DIAGONAL,
            HAS_STARTS, HAS_VALID, True, PRECISION,
        )  # fmt: skip
    else:
        most = tl.max(x, 1)
        weights = _weights(x, most)
        inner = tl.sum(weights, 1)
        product = tl.sum(weights * dp, 1)
        value = tl.sum(tl.where((n == M)[None, :], raw, 0.0), 1)
    value = _landmark(
        q, k, value, inner, j0, end, p, last, flags, start, k_t, scale, M, D, BD, JOINED, DIAGONAL,
        HAS_STARTS, HAS_VALID,
        PRECISION,
    )  # fmt: skip
    constant = product / tl.where(inner == 0.0, 1.0, inner)
    if DIAGONAL:
        own_section = p <= j0 + M
        gate = tl.exp2(tl.where(own_section, most, value) - level)
        by_landmark = tl.where(own_section, 0.0, gate * (constant - delta))
        factor = gate / tl.where(own_section | (inner == 0.0), 1.0, inner)
        constant = tl.where(own_section, delta, constant)
    else:
        gate = tl.exp2(value - level)
        by_landmark = gate * (constant - delta)
        factor = gate / tl.where(inner == 0.0, 1.0, inner)
    return dp, most, factor, constant, by_landmark


@triton.jit
def _level(lse, place, real):
    """Compute log-sum-exps in powers of two; +inf, so that all weights are 0, where nothing was
    seen."""
    logsumexp = tl.load(lse + place, mask=real, other=-float("inf"))
    return tl.where(logsumexp == -float("inf"), float("inf"), logsumexp * 1.4426950408889634)


@triton.jit
def _query_section(
    q, dout, k, v, j0, end, p, last, flags, start, level, delta, k_t, v_t, scale, dq,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a section's part to the gradient of a tile of queries."""
    n = tl.arange(0, BN)
    j = j0 + n
    real = (n < M + JOINED) & (j < end)
    keys = _tile(k, j, real, k_t, D, BD)
    values = _tile(v, j, real, v_t, D, BD)
    raw, x = _scores(
        q, keys, n, j, end, last, flags, start, scale, M, DIAGONAL, HAS_STARTS, HAS_VALID,
        PRECISION,
    )  # fmt: skip
    dp, most, factor, constant, by_landmark = _gradients(
        q, dout, k, v, x, raw, n, j, j0, end, real, values, p, last, flags, start, level, delta,
        k_t, v_t,
        scale, M, D, BD, BM, BN, JOINED, DIAGONAL, HAS_STARTS, HAS_VALID, PRECISION,
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
        _, x = _scores(
            q, keys, n, j, end, last, flags, start, scale, M, DIAGONAL, HAS_STARTS, HAS_VALID,
            PRECISION,
        )  # fmt: skip
        dp = dot(dout, tl.trans(values), PRECISION)
        dx = _weights(x, most) * factor[:, None] * (dp - constant[:, None])
        if JOINED:
            dx = tl.where((n == M)[None, :], by_landmark[:, None], dx)
        dq += dot(dx.to(keys.dtype), keys, PRECISION)
    return dq


@triton.jit
def query_bwd_kernel(
    q, k, v, places, lasts, starts, valid, out, lse, dout, dlse, dq, deltas,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, queries, tokens, heads, group,
    scale, plain,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, PLACED: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a tile of queries of one head; keeps delta for the keys' pass."""
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
    for section in range(first, middle):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total = _query_section(
            query, grad, own_k, own_v, j0, tokens, p, last, flags, start, level, delta, k_t, v_t,
            scale, total,
            M, D, BD, BM, BN, JOINED, False, HAS_STARTS, HAS_VALID, PRECISION,
        )  # fmt: skip
    for section in range(tl.maximum(first, middle), stop):
        j0 = tl.full([], 0, tl.int64) + section * (M + 1)
        total = _query_section(
            query, grad, own_k, own_v, j0, tokens, p, last, flags, start, level, delta, k_t, v_t,
            scale, total,
            M, D, BD, BM, BN, JOINED, True, HAS_STARTS, HAS_VALID, PRECISION,
        )  # fmt: skip
    i_d = tl.arange(0, BD)
    tl.store(
        dq + place[:, None] * D + i_d[None, :], (total * plain).to(dq.dtype.element_ty),
        mask=real[:, None] & (i_d < D)[None, :],
    )  # fmt: skip


@triton.jit
def _key_tile(
    q, dout, places, lasts, starts, flags, lse, deltas, k, v, keys, values, n, j, j0, real, row,
    place, t, queries,
    tokens, q_t, k_t, v_t, d_t, scale, dk, dv, dl,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, DIAGONAL: tl.constexpr, PLACED: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries' part to the gradients of a tile of keys and values."""
    asked = t < queries
    p = tokens - queries + t
    query = _tile(q, t, asked, q_t, D, BD)
    grad = _tile(dout, t, asked, d_t, D, BD)
    level = _level(lse, place + t, asked)
    delta = tl.load(deltas + place + t, mask=asked, other=0.0)
    p, last, start = _positions(
        places, lasts, starts, row * queries + t, asked, p, tokens, PLACED, HAS_STARTS
    )
    raw, x = _scores(
        query, keys, n, j, tokens, last, flags, start, scale, M, DIAGONAL, HAS_STARTS, HAS_VALID,
        PRECISION,
    )  # fmt: skip
    dp, most, factor, constant, by_landmark = _gradients(
        query, grad, k, v, x, raw, n, j, j0, tokens, real, values, p, last, flags, start, level,
        delta, k_t,
        v_t, scale, M, D, BD, BM, BN, JOINED, DIAGONAL, HAS_STARTS, HAS_VALID, PRECISION,
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
def _seen_by(
    places, starts, row, j0, queries, tokens,
    M: tl.constexpr, BM: tl.constexpr, PLACED: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Find the tiles of queries that can see a section: the first, the first that needs no causal
    mask, and the one behind the last."""
    tiles = (queries + BM - 1) // BM
    history = tokens - queries
    first = (tl.maximum(j0 - history, 0) // BM).to(tl.int32)
    after = (tl.maximum(j0 + M + 1 - history, 0) + BM - 1) // BM
    middle, stop = tl.minimum(after, tiles).to(tl.int32), tiles
    if PLACED:
        first, middle = tiles, tiles
        for tile in range(0, tiles):
            t = tile * BM + tl.arange(0, BM)
            own_p = tl.load(places + row * queries + t, mask=t < queries, other=-1)
            first = tl.minimum(first, tl.where(tl.max(own_p, 0) >= j0, tile, tiles))
    if HAS_STARTS:
        stop = first
        for tile in range(first, tiles):
            t = tile * BM + tl.arange(0, BM)
            start = tl.load(starts + row * queries + t, mask=t < queries, other=tokens)
            stop = tl.maximum(stop, tl.where(tl.min(start, 0) <= j0 + M, tile + 1, 0))
        middle = tl.minimum(middle, stop)
    return first, middle, stop


@triton.jit
def key_bwd_kernel(
    q, k, v, places, lasts, starts, valid, lse, deltas, dout, dk, dv,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, queries, tokens, heads, group,
    scale, plain,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    JOINED: tl.constexpr, PLACED: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of keys and values of one section, over all queries that see
    it."""
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
    flags = valid + row * tokens
    first, middle, stop = _seen_by(
        places, starts, row, j0, queries, tokens, M, BM, PLACED, HAS_STARTS
    )
    for g in range(0, group):
        reader = head * group + g
        place = (row * heads * group + reader) * queries
        own_q, own_d = q + row * q_b + reader * q_h, dout + row * d_b + reader * d_h
        for tile in range(first, middle):
            t = tl.full([], 0, tl.int64) + tile * BM + tl.arange(0, BM)
            grad_k, grad_v, grad_l = _key_tile(
                own_q, own_d, places, lasts, starts, flags, lse, deltas, own_k, own_v, keys,
                values, n, j, j0, real, row, place, t, queries, tokens, q_t, k_t, v_t, d_t, scale,
                grad_k, grad_v, grad_l, M, D, BD, BM, BN, JOINED, True, PLACED, HAS_STARTS,
                HAS_VALID, PRECISION,
            )  # fmt: skip
        for tile in range(middle, stop):
            t = tl.full([], 0, tl.int64) + tile * BM + tl.arange(0, BM)
            grad_k, grad_v, grad_l = _key_tile(
                own_q, own_d, places, lasts, starts, flags, lse, deltas, own_k, own_v, keys,
                values, n, j, j0, real, row, place, t, queries, tokens, q_t, k_t, v_t, d_t, scale,
                grad_k, grad_v, grad_l, M, D, BD, BM, BN, JOINED, False, PLACED, HAS_STARTS,
                HAS_VALID, PRECISION,
            )  # fmt: skip
    i_d = tl.arange(0, BD)
    at = (row * heads + head) * tokens
    offsets = (at + j[:, None]) * D + i_d[None, :]
    inside = real[:, None] & (i_d < D)[None, :]
    tl.store(dk + offsets, (grad_k * plain).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + offsets, grad_v.to(dv.dtype.element_ty), mask=inside)
    if not JOINED:
        i = tl.arange(0, 16)[:, None]
        offsets = (at + j0 + M + i) * D + i_d[None, :]
        inside = (i + part == 0) & (i_d < D)[None, :] & (j0 + M + i < tokens)
        tl.store(dk + offsets, (grad_l * plain).to(dk.dtype.element_ty), mask=inside)
        tl.store(dv + offsets, tl.zeros([16, BD], tl.float32).to(dv.dtype.element_ty), mask=inside)
