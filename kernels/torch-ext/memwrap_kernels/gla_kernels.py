"""Triton kernels of chunked gated linear attention, forward.

With G the sum of log gates from a chunk's beginning to each of its tokens (a vector or a number
each), S the state before the chunk and G_C the whole chunk's sum:

    o_i = scale (q_i exp(G_i)) S + sum_{j <= i} A_ij v_j
    A_ij = scale sum_d q_id k_jd exp(G_id - G_jd)
    S_next = exp(G_C) S + sum_j (k_j exp(G_C - G_j))^T v_j

No decay is ever divided by another: with a gate a channel, the pairs of a chunk are met at seams.
The chunk is halved again and again; a pair meets where the two tokens are parted, and both carry
factors of at most 1 to that place. States lie in slots `(R, Hkv, slots, Dk, Dv)` in float32: each
chunk's state before it, and one more after the last of a sequence. GATE: 0 none, 1 a number, 2 a
vector. `table` holds (first token, end, slot) of each chunk and `spans` (first chunk, chunks,
first slot) of each sequence where several are joined in one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import dot


@triton.jit
def _chunk(table, chunk, tokens, C: tl.constexpr, HAS_TABLE: tl.constexpr):
    """Return first token, end and slot of a chunk."""
    if HAS_TABLE:
        start = tl.load(table + chunk * 3).to(tl.int64)
        end = tl.load(table + chunk * 3 + 1).to(tl.int64)
        slot = tl.load(table + chunk * 3 + 2).to(tl.int64)
    else:
        slot = tl.full([], 0, tl.int64) + chunk
        start = slot * C
        end = tl.minimum(start + C, tokens)
    return start, end, slot


@triton.jit
def _rows(base, t, i, real, step, SIZE: tl.constexpr):
    """Load rows t and columns i of a matrix in float32, 0 outside."""
    valid = real[:, None] & (i < SIZE)[None, :]
    return tl.load(base + t[:, None] * step + i[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _sums(gates, t, i, real, DK: tl.constexpr, GATE: tl.constexpr):
    """Compute G of some tokens: `(T, K)`, or `(T, 1)` for a gate that is a number."""
    if GATE == 2:
        return _rows(gates, t, i, real, DK, DK)
    else:
        return tl.load(gates + t, mask=real, other=0.0)[:, None]


@triton.jit
def _last(gates, end, i, DK: tl.constexpr, GATE: tl.constexpr):
    """Compute G_C of a chunk that ends at `end`, `(K)` or a number for all."""
    if GATE == 2:
        return tl.load(gates + (end - 1) * DK + i, mask=i < DK, other=0.0)
    else:
        return tl.load(gates + (end - 1) + i * 0)


@triton.jit
def _decay(x):
    """Compute exp for exponents that are at most 0 wherever they count."""
    return tl.exp(tl.minimum(x, 0.0))


@triton.jit
def _seam(gates, gate_sums, start, end, i_k, half, C: tl.constexpr, DK: tl.constexpr):
    """Compute, at a level of halving, the factors of the later halves' tokens and of the earlier
    ones'."""
    i = tl.arange(0, C)
    seam = start + (i // (2 * half)) * (2 * half) + half
    later = ((i // half) % 2 == 1)[:, None]
    seam_sums = _rows(gates, seam, i_k, seam < end, DK, DK)
    after, before = _decay(gate_sums - seam_sums), _decay(seam_sums - gate_sums)
    return tl.where(later, after, 0.0), tl.where(later, 0.0, before)


@triton.jit
def cumulate_kernel(
    g, out, table, g_b, g_h, g_t, tokens, heads,
    W: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Compute the sums of log gates inside each chunk."""
    blocks: tl.constexpr = (W + BW - 1) // BW
    memory = tl.program_id(1).to(tl.int64)
    start, end, _ = _chunk(table, tl.program_id(0) // blocks, tokens, C, HAS_TABLE)
    i = (tl.program_id(0) % blocks) * BW + tl.arange(0, BW)
    t = start + tl.arange(0, C)
    at = g + (memory // heads) * g_b + (memory % heads) * g_h
    total = tl.cumsum(_rows(at, t, i, t < end, g_t, W), 0)
    offsets = (memory * tokens + t[:, None]) * W + i[None, :]
    tl.store(out + offsets, total, mask=(t < end)[:, None] & (i < W)[None, :])


@triton.jit
def states_kernel(
    x, y, gates, states, initial, table, spans,
    x_b, x_h, x_t, y_b, y_h, y_t, tokens, chunks, slots, heads, group, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all states of a sequence from keys and values; REVERSE: the gradients of all states
    from queries and the gradients of what they read."""
    blocks: tl.constexpr = (DV + BV - 1) // BV
    sequence = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    i_k = (tl.program_id(0) // blocks) * BK + tl.arange(0, BK)
    i_v = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
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
    at = slot + count if REVERSE else slot
    tl.store(base + at * DK * DV + offsets, state, mask=inside)
    sums = gates + memory * tokens * (DK if GATE == 2 else 1)
    for n in range(0, count):
        chunk = first + (count - 1 - n if REVERSE else n)
        start, end, slot = _chunk(table, chunk, tokens, C, HAS_TABLE)
        t = start + tl.arange(0, C)
        real = t < end
        if GATE:
            total, each = _last(sums, end, i_k, DK, GATE), _sums(sums, t, i_k, real, DK, GATE)
            factor = _decay(each) if REVERSE else _decay(total[None, :] - each)
            state = state * _decay(total)[:, None]
        for g in range(0, group):
            reader = head * group + g
            left = _rows(x + row * x_b + reader * x_h, t, i_k, real, x_t, DK) * scale
            if GATE:
                left = left * factor
            right = _rows(y + row * y_b + reader * y_h, t, i_v, real, y_t, DV)
            state += dot(tl.trans(left), right, PRECISION)
        at = slot if REVERSE else slot + 1
        tl.store(base + at * DK * DV + offsets, state, mask=inside)


@triton.jit
def scores_kernel(
    q, k, gates, out, table, q_b, q_h, q_t, k_b, k_h, k_t, tokens, heads, group, scale,
    DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute A of each chunk, `(B, H, T, C)`."""
    start, end, _ = _chunk(table, tl.program_id(0), tokens, C, HAS_TABLE)
    row = (tl.program_id(1) // (heads * group)).to(tl.int64)
    reader = (tl.program_id(1) % (heads * group)).to(tl.int64)
    head = reader // group
    i, t = tl.arange(0, C), start + tl.arange(0, C)
    real = t < end
    sums = gates + (row * heads + head) * tokens * (DK if GATE == 2 else 1)
    total = tl.zeros([C, C], tl.float32)
    for first in range(0, DK, BK):
        i_k = first + tl.arange(0, BK)
        query = _rows(q + row * q_b + reader * q_h, t, i_k, real, q_t, DK)
        key = _rows(k + row * k_b + head * k_h, t, i_k, real, k_t, DK)
        if GATE == 2:
            gate_sums = _sums(sums, t, i_k, real, DK, GATE)
            total += tl.where(i[:, None] == i[None, :], tl.sum(query * key, 1)[:, None], 0.0)
            for level in range(0, LEVELS):
                later, earlier = _seam(sums, gate_sums, start, end, i_k, 1 << level, C, DK)
                part = dot(query * later, tl.trans(key * earlier), PRECISION)
                block = i // (2 << level)
                total += tl.where(block[:, None] == block[None, :], part, 0.0)
        else:
            total += dot(query, tl.trans(key), PRECISION)
    if GATE == 1:
        gate_sums = tl.load(sums + t, mask=real, other=0.0)
        total = total * _decay(gate_sums[:, None] - gate_sums[None, :])
    total = tl.where(i[:, None] >= i[None, :], total * scale, 0.0)
    place = (row * heads * group + reader) * tokens + t
    tl.store(out + place[:, None] * C + i[None, :], total, mask=real[:, None])


@triton.jit
def output_kernel(
    q, v, gates, states, scores, out, table,
    q_b, q_h, q_t, v_b, v_h, v_t, tokens, slots, heads, group, scale,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read for the tokens of a chunk: of the state before it, and of each other."""
    blocks: tl.constexpr = (DV + BV - 1) // BV
    start, end, slot = _chunk(table, tl.program_id(0) // blocks, tokens, C, HAS_TABLE)
    row = (tl.program_id(1) // (heads * group)).to(tl.int64)
    reader = (tl.program_id(1) % (heads * group)).to(tl.int64)
    memory = row * heads + reader // group
    i_v = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    i, t = tl.arange(0, C), start + tl.arange(0, C)
    real = t < end
    sums = gates + memory * tokens * (DK if GATE == 2 else 1)
    source = states + (memory * slots + slot) * DK * DV
    total = tl.zeros([C, BV], tl.float32)
    for first in range(0, DK, BK):
        i_k = first + tl.arange(0, BK)
        query = _rows(q + row * q_b + reader * q_h, t, i_k, real, q_t, DK) * scale
        if GATE:
            query = query * _decay(_sums(sums, t, i_k, real, DK, GATE))
        state = _rows(source, i_k, i_v, i_k < DK, DV, DV)
        total += dot(query, state, PRECISION)
    place = (row * heads * group + reader) * tokens + t
    weights = _rows(scores, place, i, real, C, C)
    value = _rows(v + row * v_b + (reader // group) * v_h, t, i_v, real, v_t, DV)
    total += dot(weights, value, PRECISION)
    offsets = place[:, None] * DV + i_v[None, :]
    tl.store(
        out + offsets, total.to(out.dtype.element_ty), mask=real[:, None] & (i_v < DV)[None, :]
    )
