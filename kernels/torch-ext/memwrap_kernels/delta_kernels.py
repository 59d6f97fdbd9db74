"""Triton kernels of the (gated) delta rule: what goes from chunk to chunk, forward and backward.

Inside a chunk the rule is solved for what its tokens write, given the state S before it, with G
the sums of log gates from the chunk's beginning:

    (I + L) change = beta (v - exp(G) k S)      L_ij = beta_i exp(G_i - G_j) k_i k_j, j < i
    change = u - w S                            u = (I + L)^-1 beta v, w = (I + L)^-1 beta exp(G) k

The rest is gated linear attention with `change` for values. Slots and tables are those of
`gla_kernels`. E, the gradient of the state after a chunk, goes back by

    d change = A^T dout + (k exp(G_C - G)) E
    E_before = exp(G_C) E + (scale q exp(G))^T dout - w^T d change
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gla_kernels import _chunk, _decay, _last, _rows, _sums
from .products import dot


@triton.jit
def changes_kernel(
    k, u, w, gates, states, changes, initial, table, spans,
    k_b, k_h, k_t, tokens, chunks, slots, heads,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all states of a sequence, and what each token writes; some of the value channels."""
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    i_k, i_v = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    inside = (i_k < DK)[:, None] & (i_v < DV)[None, :]
    offsets = i_k[:, None] * DV + i_v[None, :]
    first, count, row = 0, chunks, sequence
    slot = tl.full([], 0, tl.int64)
    if HAS_TABLE:
        first = tl.load(spans + sequence * 3)
        count = tl.load(spans + sequence * 3 + 1)
        slot += tl.load(spans + sequence * 3 + 2)
        row = tl.full([], 0, tl.int64)
    memory = row * heads + head
    source = initial + (sequence * heads + head) * DK * DV
    state = tl.load(source + offsets, mask=inside, other=0.0)
    base = states + memory * slots * DK * DV
    tl.store(base + slot * DK * DV + offsets, state, mask=inside)
    sums = gates + memory * tokens
    for n in range(0, count):
        start, end, slot = _chunk(table, first + n, tokens, C, HAS_TABLE)
        t = start + tl.arange(0, C)
        real = t < end
        at = memory * tokens + t
        change = _rows(u, at, i_v, real, DV, DV)
        change -= dot(_rows(w, at, i_k, real, DK, DK), state, PRECISION)
        shown = real[:, None] & (i_v < DV)[None, :]
        tl.store(changes + at[:, None] * DV + i_v[None, :], change, mask=shown)
        key = _rows(k + row * k_b + head * k_h, t, i_k, real, k_t, DK)
        if GATE:
            total = _last(sums, end, i_k, DK, GATE)
            key = key * _decay(total[None, :] - _sums(sums, t, i_k, real, DK, GATE))
            state = state * _decay(total)[:, None]
        state += dot(tl.trans(key), change, PRECISION)
        tl.store(base + (slot + 1) * DK * DV + offsets, state, mask=inside)


@triton.jit
def changes_bwd_kernel(
    q, k, w, gates, scores, dout, grads, dchanges, initial, table, spans,
    q_b, q_h, q_t, k_b, k_h, k_t, d_b, d_h, d_t, tokens, chunks, slots, heads, group, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of all states, and of what each token writes."""
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    i_k, i_v = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    inside = (i_k < DK)[:, None] & (i_v < DV)[None, :]
    offsets = i_k[:, None] * DV + i_v[None, :]
    first, count, row = 0, chunks, sequence
    slot = tl.full([], 0, tl.int64)
    if HAS_TABLE:
        first = tl.load(spans + sequence * 3)
        count = tl.load(spans + sequence * 3 + 1)
        slot += tl.load(spans + sequence * 3 + 2)
        row = tl.full([], 0, tl.int64)
    memory = row * heads + head
    source = initial + (sequence * heads + head) * DK * DV
    state = tl.load(source + offsets, mask=inside, other=0.0)
    base = grads + memory * slots * DK * DV
    tl.store(base + (slot + count) * DK * DV + offsets, state, mask=inside)
    sums = gates + memory * tokens
    for n in range(0, count):
        start, end, slot = _chunk(table, first + (count - 1 - n), tokens, C, HAS_TABLE)
        t = start + i
        real = t < end
        at = memory * tokens + t
        key = _rows(k + row * k_b + head * k_h, t, i_k, real, k_t, DK)
        if GATE:
            total = _last(sums, end, i_k, DK, GATE)
            each = _sums(sums, t, i_k, real, DK, GATE)
            key = key * _decay(total[None, :] - each)
        if BK > 128:
            # With keys on the left sm_90 multiplies by groups of four warps, whose operands and
            # descriptors fill the registers; with a few value channels on the left it does not.
            change = tl.trans(dot(tl.trans(state), tl.trans(key), PRECISION))
        else:
            change = dot(key, state, PRECISION)
        if GATE:
            state = state * _decay(total)[:, None]
        for g in range(0, group):
            reader = head * group + g
            place = (row * heads * group + reader) * tokens + t
            grad = _rows(dout + row * d_b + reader * d_h, t, i_v, real, d_t, DV)
            weights = _rows(scores, place, i, real, C, C)
            change += dot(tl.trans(weights), grad, PRECISION)
            query = _rows(q + row * q_b + reader * q_h, t, i_k, real, q_t, DK) * scale
            if GATE:
                query = query * _decay(each)
            state += dot(tl.trans(query), grad, PRECISION)
        state -= dot(tl.trans(_rows(w, at, i_k, real, DK, DK)), change, PRECISION)
        shown = real[:, None] & (i_v < DV)[None, :]
        tl.store(dchanges + at[:, None] * DV + i_v[None, :], change, mask=shown)
        tl.store(base + slot * DK * DV + offsets, state, mask=inside)


@triton.jit
def readers_bwd_kernel(
    states, dchanges, dw, table, tokens, slots,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `dw = -(d change) S^T` of a chunk, for some of the key channels."""
    blocks: tl.constexpr = (DK + BK - 1) // BK
    start, end, slot = _chunk(table, tl.program_id(0) // blocks, tokens, C, HAS_TABLE)
    memory = tl.program_id(1).to(tl.int64)
    i_k = (tl.program_id(0) % blocks) * BK + tl.arange(0, BK)
    t = start + tl.arange(0, C)
    real = t < end
    at = memory * tokens + t
    total = tl.zeros([C, BK], tl.float32)
    for first in range(0, DV, BV):
        i_v = first + tl.arange(0, BV)
        change = _rows(dchanges, at, i_v, real, DV, DV)
        state = _rows(states + (memory * slots + slot) * DK * DV, i_k, i_v, i_k < DK, DV, DV)
        total -= dot(change, tl.trans(state), PRECISION)
    shown = real[:, None] & (i_k < DK)[None, :]
    tl.store(dw + at[:, None] * DK + i_k[None, :], total, mask=shown)


@triton.jit
def step_kernel(
    q, k, v, g, beta, state, out, last,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, tokens, heads, group, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Run a few tokens, one after the other, with the state in registers: decoding.

    BETA: 0 no delta rule, 1 a number, 2 a number a value channel.
    """
    memory = tl.program_id(1).to(tl.int64)
    row, head = memory // heads, memory % heads
    i_k, i_v = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    in_k, in_v = i_k < DK, i_v < DV
    offsets = memory * DK * DV + i_k[:, None] * DV + i_v[None, :]
    inside = in_k[:, None] & in_v[None, :]
    matrix = tl.load(state + offsets, mask=inside, other=0.0)
    for n in range(0, tokens):
        t = tl.full([], 0, tl.int64) + n
        at = memory * tokens + t
        if GATE == 1:
            matrix = matrix * tl.exp(tl.load(g + at))
        if GATE == 2:
            gate = tl.load(g + at * DK + i_k, mask=in_k, other=0.0)
            matrix = matrix * tl.exp(gate)[:, None]
        key = tl.load(k + row * k_b + head * k_h + t * k_t + i_k, mask=in_k, other=0.0)
        value = tl.load(v + row * v_b + head * v_h + t * v_t + i_v, mask=in_v, other=0.0)
        key, value = key.to(tl.float32), value.to(tl.float32)
        if BETA:
            value -= tl.sum(key[:, None] * matrix, 0)
        if BETA == 1:
            value = value * tl.load(beta + at)
        if BETA == 2:
            value = value * tl.load(beta + at * DV + i_v, mask=in_v, other=0.0)
        matrix += key[:, None] * value[None, :]
        for i in range(0, group):
            reader = head * group + i
            query = tl.load(q + row * q_b + reader * q_h + t * q_t + i_k, mask=in_k, other=0.0)
            read = tl.sum((query.to(tl.float32) * scale)[:, None] * matrix, 0)
            place = ((row * heads * group + reader) * tokens + t) * DV + i_v
            tl.store(out + place, read.to(out.dtype.element_ty), mask=in_v)
    tl.store(last + offsets, matrix, mask=inside)
