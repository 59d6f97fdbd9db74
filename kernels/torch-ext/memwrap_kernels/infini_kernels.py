"""Triton kernels of the compressive memory (Infini-attention).

The states before and after every segment lie in one buffer of N + 1 slots, M
`(B, Hkv, N + 1, Dk, Dv)` and z `(B, Hkv, N + 1, Dk)`: slot s is read by segment s. With
`phi(x) = ELU(x) + 1`, `c = max(phi z, eps)` and, for the delta rule,
`A_s = sum_t phi_t^T phi_t / c_t` (symmetric), everything that is sequential is

    M_{s+1} = M_s + S_s - A_s M_s          S_s = sum_t phi(k_t)^T v_t
    E_s     = E_{s+1} + R_s - A_s E_{s+1}  R_s = sum_t phi(q_t)^T dout_t / c_t

with E the gradients of the states (A is 0 for the linear update). All else is parallel over
segments and tokens. Token tiles never cross segments. Tiles are padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _phi(x):
    x = x.to(tl.float32)
    return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def _features(at, t, x_t, real, DK: tl.constexpr, BK: tl.constexpr):
    """Compute phi of a tile of tokens of the head at `at`; 0 where `real` is false."""
    i_k = tl.arange(0, BK)
    valid = real[:, None] & (i_k < DK)[None, :]
    x = tl.load(at + t[:, None] * x_t + i_k[None, :], mask=valid, other=0.0)
    return tl.where(valid, _phi(x), 0.0)


@triton.jit
def _inverse(phi, z, eps):
    """Compute 1 / max(phi z, eps), 0 where the memory is empty; and phi z."""
    denominator = tl.sum(phi * z[None, :], 1)
    safe = tl.where(denominator == 0.0, 1.0, tl.maximum(denominator, eps))
    inverse = tl.where(denominator == 0.0, 0.0, 1.0 / safe)
    return inverse, denominator


@triton.jit
def outer_kernel(
    x, y, mask, z, weight, out, out_z,
    x_b, x_h, x_t, y_b, y_h, y_t, slots, first_slot,
    tokens, segment_size, segments, heads, group, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    OWN: tl.constexpr, DIVIDE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out_s = sum_t phi(x_t)^T y_t [/ c_t]` and `out_z_s = sum_t [weight_t] phi(x_t)`.

    Sums over the tokens of a segment and the `group` query heads of a memory head. OWN: y is
    phi(x) itself. DIVIDE: by the denominator with this segment's z.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    memory = row * heads + head
    i_k, i_v, i_t = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, BT)
    own_z = tl.zeros([BK], tl.float32)
    if DIVIDE:
        own_z = tl.load(z + (memory * slots + segment) * DK + i_k, mask=i_k < DK, other=0.0)
    total = tl.zeros([BK, BV], tl.float32)
    total_z = tl.zeros([BK], tl.float32)
    start = segment * segment_size
    end = tl.minimum(start + segment_size, tokens)
    for g in range(0, group):
        reader = head * group + g
        for offset in range(0, segment_size, BT):
            t = start + offset + i_t
            real = t < end
            if HAS_MASK:
                real = real & (tl.load(mask + row * tokens + t, mask=real, other=0) != 0)
            phi = _features(x + row * x_b + reader * x_h, t, x_t, real, DK, BK)
            if OWN:
                at = x + row * x_b + reader * x_h + t[:, None] * x_t
                valid = real[:, None] & (i_v < DV)[None, :]
                value = tl.load(at + i_v[None, :], mask=valid, other=0.0)
                value = tl.where(valid, _phi(value), 0.0)
            else:
                at = y + row * y_b + reader * y_h + t[:, None] * y_t
                valid = real[:, None] & (i_v < DV)[None, :]
                value = tl.load(at + i_v[None, :], mask=valid, other=0.0).to(tl.float32)
            if DIVIDE:
                inverse, _ = _inverse(phi, own_z, eps)
                value = value * inverse[:, None]
            total += tl.dot(tl.trans(phi), value, input_precision=PRECISION)
            if WANT_Z:
                if HAS_WEIGHT:
                    at_w = weight + (row * heads * group + reader) * tokens + t
                    w = tl.load(at_w, mask=real, other=0.0)
                    total_z += tl.sum(phi * w[:, None], 0)
                else:
                    total_z += tl.sum(phi, 0)
    slot = memory * slots + segment + first_slot
    at = out + (slot * DK + i_k[:, None]) * DV + i_v[None, :]
    tl.store(at, total, mask=(i_k < DK)[:, None] & (i_v < DV)[None, :])
    if WANT_Z:
        tl.store(out_z + slot * DK + i_k, total_z, mask=i_k + block * BK < DK)  # once


@triton.jit
def recurrence_kernel(
    states, a, segments,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, HAS_A: tl.constexpr,
):  # fmt: skip
    """Go over the slots, in place: `new += old - A old`, forward or backward through segments."""
    block, memory = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_k, i_v = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    inside = (i_k < DK)[:, None] & (i_v < DV)[None, :]
    offsets = i_k[:, None] * DV + i_v[None, :]
    base = states + memory * (segments + 1) * DK * DV
    size = tl.full([], DK * DV, tl.int64)
    old = tl.load(
        base + (segments * size if REVERSE else 0 * size) + offsets, mask=inside, other=0.0
    )
    for step in range(0, segments):
        if REVERSE:
            segment = segments - 1 - step
            source, target = base + (segment + 1) * size, base + segment * size
        else:
            segment = step
            source, target = base + segment * size, base + (segment + 1) * size
        new = old + tl.load(target + offsets, mask=inside, other=0.0)
        if HAS_A:
            at_a = a + (memory * segments + segment) * DK * DK
            for c in range(0, DK, BC):
                i_c = c + tl.arange(0, BC)
                part = tl.load(
                    at_a + i_c[None, :] * DK + i_k[:, None],
                    mask=(i_k < DK)[:, None] & (i_c < DK)[None, :], other=0.0,
                )  # fmt: skip
                rows = tl.load(
                    source + i_c[:, None] * DV + i_v[None, :],
                    mask=(i_c < DK)[:, None] & (i_v < DV)[None, :], other=0.0,
                )  # fmt: skip
                new -= tl.dot(part, rows, input_precision="ieee")
        tl.store(target + offsets, new, mask=inside)
        if HAS_A:
            tl.debug_barrier()  # the next step reads these rows from memory, by other threads
        old = new


@triton.jit
def lookup_kernel(
    q, states, z, out,
    q_b, q_h, q_t, slots, tokens, segment_size, spans, span, heads, group, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute `out_t = phi(q_t) M_s / c_t`: a span of tokens of one segment, one query head."""
    blocks: tl.constexpr = (DV + BV - 1) // BV
    part = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    segment, first = (part // spans).to(tl.int64), (part % spans) * span
    readers = heads * group
    row = (tl.program_id(1) // readers).to(tl.int64)
    reader = (tl.program_id(1) % readers).to(tl.int64)
    slot = (row * heads + reader // group) * slots + segment
    i_k, i_v, i_t = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, BT)
    own_z = tl.load(z + slot * DK + i_k, mask=i_k < DK, other=0.0)
    matrix = tl.load(
        states + (slot * DK + i_k[:, None]) * DV + i_v[None, :],
        mask=(i_k < DK)[:, None] & (i_v < DV)[None, :], other=0.0,
    )  # fmt: skip
    end = tl.minimum(segment * segment_size + tl.minimum(first + span, segment_size), tokens)
    for offset in range(0, span, BT):
        t = segment * segment_size + first + offset + i_t
        real = t < end
        phi = _features(q + row * q_b + reader * q_h, t, q_t, real, DK, BK)
        inverse, _ = _inverse(phi, own_z, eps)
        value = tl.dot(phi, matrix, input_precision=PRECISION) * inverse[:, None]
        at = out + ((row * readers + reader) * tokens + t[:, None]) * DV + i_v[None, :]
        tl.store(at, value, mask=real[:, None] & (i_v < DV)[None, :])


@triton.jit
def _queries_bwd(
    at_q, at_dout, at_dq, states, own_z, t, real, q_t, d_t, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile of queries; return phi and each token's weight in that of
    z.

    `at_q`, `at_dout` and `at_dq` point to the first token of a head, `states` to M of the slot.
    """
    i_k = tl.arange(0, BK)
    phi = _features(at_q, t, q_t, real, DK, BK)
    inverse, denominator = _inverse(phi, own_z, eps)
    product = tl.zeros([BT, BK], tl.float32)
    for v in range(0, DV, BV):
        i_v = v + tl.arange(0, BV)
        at_d = at_dout + t[:, None] * d_t + i_v[None, :]
        value = tl.load(at_d, mask=real[:, None] & (i_v < DV)[None, :], other=0.0).to(tl.float32)
        matrix = tl.load(
            states + i_k[None, :] * DV + i_v[:, None],
            mask=(i_k < DK)[None, :] & (i_v < DV)[:, None], other=0.0,
        )  # fmt: skip
        product += tl.dot(value, matrix, input_precision=PRECISION)
    share = -tl.sum(phi * product, 1) * inverse * inverse
    share = tl.where(denominator >= eps, share, 0.0)
    gradient = product * inverse[:, None] + share[:, None] * own_z[None, :]
    gradient = gradient * tl.minimum(phi, 1.0)
    at = at_dq + t[:, None] * DK + i_k[None, :]
    valid = real[:, None] & (i_k < DK)[None, :]
    tl.store(at, gradient.to(at_dq.dtype.element_ty), mask=valid)
    return phi, share


@triton.jit
def lookup_bwd_kernel(
    q, states, z, dout, dq, weight,
    q_b, q_h, q_t, d_b, d_h, d_t, slots, tokens, segment_size, tiles, heads, group, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the queries, and each token's weight in the gradient of z."""
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BT
    readers = heads * group
    row = (tl.program_id(1) // readers).to(tl.int64)
    reader = (tl.program_id(1) % readers).to(tl.int64)
    slot = (row * heads + reader // group) * slots + segment
    i_k = tl.arange(0, BK)
    start = segment * segment_size
    t = start + first + tl.arange(0, BT)
    real = t < tl.minimum(start + segment_size, tokens)
    own_z = tl.load(z + slot * DK + i_k, mask=i_k < DK, other=0.0)
    place = (row * readers + reader) * tokens
    _, share = _queries_bwd(
        q + row * q_b + reader * q_h, dout + row * d_b + reader * d_h, dq + place * DK,
        states + slot * DK * DV, own_z, t, real, q_t, d_t, eps, DK, DV, BK, BV, BT, PRECISION,
    )  # fmt: skip
    tl.store(weight + place + t, share, mask=real)


@triton.jit
def _keys_bwd(
    at_k, at_v, at_dk, at_dv, states, grads, own_z, after, t, inside, real, k_t, v_t, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    DELTA: tl.constexpr, ONLY_Z: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile of keys and values (unless ONLY_Z); return what the
    delta rule's denominators give to z of the segment.

    `at_k`, `at_v`, `at_dk` and `at_dv` point to the first token of a head; `states` to M before
    the segment; `grads` and `after` are the gradients of M and z after it. `inside` are the
    segment's tokens, `real` those that the mask keeps.
    """
    i_k = tl.arange(0, BK)
    phi = _features(at_k, t, k_t, real, DK, BK)
    inverse = tl.zeros([BT], tl.float32)
    denominator = inverse
    if DELTA:
        inverse, denominator = _inverse(phi, own_z, eps)
    direct = tl.zeros([BT, BK], tl.float32)
    product = tl.zeros([BT, BK], tl.float32)
    for first in range(0, DV, BV):
        i_v = first + tl.arange(0, BV)
        within = (i_k < DK)[:, None] & (i_v < DV)[None, :]
        offsets = i_k[:, None] * DV + i_v[None, :]
        grad = tl.load(grads + offsets, mask=within, other=0.0)
        change = tl.dot(phi, grad, input_precision=PRECISION)  # the gradient of the values
        chosen = real[:, None] & (i_v < DV)[None, :]
        if DELTA:
            matrix = tl.load(states + offsets, mask=within, other=0.0)
            product += tl.dot(change, tl.trans(matrix), input_precision=PRECISION)
        if not ONLY_Z:
            at = at_v + t[:, None] * v_t + i_v[None, :]
            value = tl.load(at, mask=chosen, other=0.0).to(tl.float32)
            if DELTA:
                value -= tl.dot(phi, matrix, input_precision=PRECISION) * inverse[:, None]
            direct += tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            at = at_dv + t[:, None] * DV + i_v[None, :]
            present = inside[:, None] & (i_v < DV)[None, :]  # zeros where the mask is false
            tl.store(at, change.to(at_dv.dtype.element_ty), mask=present)
    share = tl.sum(phi * product, 1) * inverse * inverse
    share = tl.where(denominator >= eps, share, 0.0)
    if not ONLY_Z:
        gradient = direct + after[None, :]
        if DELTA:
            gradient += share[:, None] * own_z[None, :] - product * inverse[:, None]
        gradient = gradient * tl.minimum(phi, 1.0)  # phi is 0 where the mask is false
        at = at_dk + t[:, None] * DK + i_k[None, :]
        shown = inside[:, None] & (i_k < DK)[None, :]
        tl.store(at, gradient.to(at_dk.dtype.element_ty), mask=shown)
    return tl.sum(share[:, None] * phi, 0)


@triton.jit
def write_bwd_kernel(
    k, v, mask, states, z, grads, grads_z, dk, dv, dz,
    k_b, k_h, k_t, v_b, v_h, v_t, tokens, segment_size, segments, tiles, heads, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    DELTA: tl.constexpr, ONLY_Z: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of keys and values from those of the state after their segment.

    ONLY_Z writes what the delta rule's denominators give to z of the segment instead (one
    partial sum a tile): the gradients of earlier keys need it.
    """
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    memory = row * heads + head
    slot = memory * (segments + 1) + segment
    i_k, i_t = tl.arange(0, BK), tl.arange(0, BT)
    start = segment * segment_size
    t = start + tile * BT + i_t
    inside = t < tl.minimum(start + segment_size, tokens)
    real = inside
    if HAS_MASK:
        real = real & (tl.load(mask + row * tokens + t, mask=real, other=0) != 0)
    own_z = tl.zeros([BK], tl.float32)
    after = own_z
    if DELTA:
        own_z = tl.load(z + slot * DK + i_k, mask=i_k < DK, other=0.0)
    if not ONLY_Z:
        after = tl.load(grads_z + (slot + 1) * DK + i_k, mask=i_k < DK, other=0.0)
    place = memory * tokens
    part = _keys_bwd(
        k + row * k_b + head * k_h, v + row * v_b + head * v_h, dk + place * DK, dv + place * DV,
        states + slot * DK * DV, grads + (slot + 1) * DK * DV, own_z, after, t, inside, real,
        k_t, v_t, eps, DK, DV, BK, BV, BT, DELTA, ONLY_Z, PRECISION,
    )  # fmt: skip
    if ONLY_Z:
        at_dz = dz + ((memory * segments + segment) * tiles + tile) * DK + i_k
        tl.store(at_dz, part, mask=i_k < DK)
