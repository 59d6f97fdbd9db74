"""Triton kernels of the gradients of chunked gated linear attention.

With the notation of `gla_kernels`, E the gradient of the state after the chunk, and
`dA_ij = scale dout_i v_j` for j <= i:

    dv_j = sum_{i >= j} A_ij dout_i + (k_j exp(G_C - G_j)) E
    dq_i = scale exp(G_i) dout_i S^T + sum_{j <= i} dA_ij exp(G_i - G_j) k_j
    dk_j = exp(G_C - G_j) v_j E^T + sum_{i >= j} dA_ij exp(G_i - G_j) q_i
    dg_t = sum_{i >= t} (q_i dq_i - k_i dk_i) + sum_v S_next E

the last sum over the chunk's tokens only: what lies beyond is the term with the states. A gate
that is a number for a head also sums over its channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gla_kernels import _chunk, _decay, _last, _rows, _seam, _sums
from .products import dot


@triton.jit
def values_bwd_kernel(
    k, gates, grads, scores, dout, dv, table,
    k_b, k_h, k_t, d_b, d_h, d_t, tokens, slots, heads, group,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the values of a chunk."""
    blocks: tl.constexpr = (DV + BV - 1) // BV
    start, end, slot = _chunk(table, tl.program_id(0) // blocks, tokens, C, HAS_TABLE)
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    memory = row * heads + head
    i_v = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    i, t = tl.arange(0, C), start + tl.arange(0, C)
    real = t < end
    total = tl.zeros([C, BV], tl.float32)
    for g in range(0, group):
        reader = head * group + g
        place = (row * heads * group + reader) * tokens + t
        weights = _rows(scores, place, i, real, C, C)
        grad = _rows(dout + row * d_b + reader * d_h, t, i_v, real, d_t, DV)
        total += dot(tl.trans(weights), grad, PRECISION)
    sums = gates + memory * tokens * (DK if GATE == 2 else 1)
    source = grads + (memory * slots + slot + 1) * DK * DV
    for first in range(0, DK, BK):
        i_k = first + tl.arange(0, BK)
        key = _rows(k + row * k_b + head * k_h, t, i_k, real, k_t, DK)
        if GATE:
            closing = _last(sums, end, i_k, DK, GATE)
            key = key * _decay(closing[None, :] - _sums(sums, t, i_k, real, DK, GATE))
        state = _rows(source, i_k, i_v, i_k < DK, DV, DV)
        total += dot(key, state, PRECISION)
    offsets = (memory * tokens + t[:, None]) * DV + i_v[None, :]
    tl.store(dv + offsets, total.to(dv.dtype.element_ty), mask=real[:, None] & (i_v < DV)[None, :])


@triton.jit
def _states_bwd(
    v, gradient, after, t, i_k, real, v_t,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of keys through the state after the chunk, and the sum of that state
    times its gradient."""
    grad_k = tl.zeros([C, BK], tl.float32)
    closing = tl.zeros([BK], tl.float32)
    for first in range(0, DV, BV):
        i_v = first + tl.arange(0, BV)
        value = _rows(v, t, i_v, real, v_t, DV)
        grad = _rows(gradient, i_k, i_v, i_k < DK, DV, DV)
        grad_k += dot(value, tl.trans(grad), PRECISION)
        if GATE:
            closing += tl.sum(grad * _rows(after, i_k, i_v, i_k < DK, DV, DV), 1)
    return grad_k, closing


@triton.jit
def _pairs_bwd(
    pairs, query, key, grad_q, grad_k, sums, gate_sums, start, end, i, t, i_k, real,
    C: tl.constexpr, DK: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of queries and keys what pairs of tokens of the chunk give each
    other."""
    if GATE == 2:
        diagonal = tl.sum(tl.where(i[:, None] == i[None, :], pairs, 0.0), 1)[:, None]
        grad_q += diagonal * key
        grad_k += diagonal * query
        for level in range(0, LEVELS):
            later, earlier = _seam(sums, gate_sums, start, end, i_k, 1 << level, C, DK)
            same = (i // (2 << level))[:, None] == (i // (2 << level))[None, :]
            # `later` and `earlier` are 0 in the halves that they do not belong to.
            part = tl.where(same, pairs, 0.0)
            grad_q += dot(part, key * earlier, PRECISION) * later
            grad_k += dot(tl.trans(part), query * later, PRECISION) * earlier
    else:
        if GATE == 1:
            each = tl.load(sums + t, mask=real, other=0.0)
            pairs = pairs * _decay(each[:, None] - each[None, :])
        grad_q += dot(pairs, key, PRECISION)
        grad_k += dot(tl.trans(pairs), query, PRECISION)
    return grad_q, grad_k


@triton.jit
def keys_bwd_kernel(
    q, k, v, gates, states, grads, weights, dout, dq, dk, dg, table,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, tokens, slots, heads, group, size,
    scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of queries, keys and gates of a chunk, for some of the key channels."""
    blocks: tl.constexpr = (DK + BK - 1) // BK
    start, end, slot = _chunk(table, tl.program_id(0) // blocks, tokens, C, HAS_TABLE)
    block = tl.program_id(0) % blocks
    memory = tl.program_id(1).to(tl.int64)
    row, head = memory // heads, memory % heads
    i_k = block * BK + tl.arange(0, BK)
    i, t = tl.arange(0, C), start + tl.arange(0, C)
    real = t < end
    shown = real[:, None] & (i_k < DK)[None, :]
    before = states + (memory * slots + slot) * DK * DV
    after, gradient = before + DK * DV, grads + (memory * slots + slot + 1) * DK * DV
    key = _rows(k + row * k_b + head * k_h, t, i_k, real, k_t, DK)
    grad_k, closing = _states_bwd(
        v + row * v_b + head * v_h, gradient, after, t, i_k, real, v_t,
        DK, DV, BK, BV, C, GATE, PRECISION,
    )  # fmt: skip
    sums = gates + memory * tokens * (DK if GATE == 2 else 1)
    gate_sums = tl.zeros([C, 1], tl.float32)
    if GATE:
        gate_sums = _sums(sums, t, i_k, real, DK, GATE)
        grad_k = grad_k * _decay(_last(sums, end, i_k, DK, GATE)[None, :] - gate_sums)
    change = tl.zeros([C, BK], tl.float32)
    for g in range(0, group):
        reader = head * group + g
        query = _rows(q + row * q_b + reader * q_h, t, i_k, real, q_t, DK)
        grad_q = tl.zeros([C, BK], tl.float32)
        for first in range(0, DV, BV):
            i_v = first + tl.arange(0, BV)
            grad = _rows(dout + row * d_b + reader * d_h, t, i_v, real, d_t, DV)
            state = _rows(before, i_k, i_v, i_k < DK, DV, DV)
            grad_q += dot(grad, tl.trans(state), PRECISION)
        grad_q = grad_q * scale
        if GATE:
            grad_q = grad_q * _decay(gate_sums)
        place = (row * heads * group + reader) * tokens + t
        grad_q, grad_k = _pairs_bwd(
            _rows(weights, place, i, real, C, C), query, key, grad_q, grad_k, sums, gate_sums,
            start, end, i, t, i_k, real, C, DK, LEVELS, GATE, PRECISION,
        )  # fmt: skip
        target = dq + place[:, None] * DK + i_k[None, :]
        tl.store(target, grad_q.to(dq.dtype.element_ty), mask=shown)
        if GATE:
            change += query * grad_q
    at = memory * tokens + t
    tl.store(dk + at[:, None] * DK + i_k[None, :], grad_k.to(dk.dtype.element_ty), mask=shown)
    if GATE:
        change = change - key * grad_k
    if GATE == 2:
        grad_g = tl.cumsum(change, 0, reverse=True) + closing[None, :]
        tl.store(dg + at[:, None] * DK + i_k[None, :], grad_g, mask=shown)
    if GATE == 1:
        grad_g = tl.cumsum(tl.sum(change, 1), 0, reverse=True) + tl.sum(closing, 0)
        tl.store(dg + block * size + at, grad_g, mask=real)
