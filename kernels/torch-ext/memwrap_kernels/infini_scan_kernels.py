"""Triton kernels that read and write all segments of a sequence in one launch a pass.

The mathematics is that of `infini_kernels`; here nothing waits for another launch. A program owns
some value channels of one memory, M `[Dk, BV]`, and walks over the segments with them in
registers. Everything about those columns needs only those columns: what is read, what is written,
what the delta rule takes off (`v_prev`), and in the backward E, the gradient of M.

Two gradients are sums over all value channels and so belong to no single program:

- Queries: they need the states alone, which the forward kept. The programs of a memory share the
  tiles of tokens among them.
- Keys: they need E after their segment from all programs of the memory. Each leaves its part in
  memory and counts itself in; the one that finds all others there computes the segment's. No
  program ever waits for another, and the result does not depend on which one it is.

The gradient of z is a sum over tokens, and over value channels where it comes from the delta
rule; each program carries a part of it, left beside its part of E.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .infini_kernels import _features, _inverse, _keys_bwd, _queries_bwd


@triton.jit
def _kept(mask, row, tokens, t, inside, HAS_MASK: tl.constexpr):
    """Tell which of the tokens the mask keeps."""
    if HAS_MASK:
        return inside & (tl.load(mask + row * tokens + t, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def scan_kernel(
    q, k, v, mask, first_M, first_z, out, states, zs, last_M, last_z,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    tokens, segment_size, segments, heads, group, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    DELTA: tl.constexpr, HAS_MASK: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read each segment with the memory before it, then write it. KEEP: store those memories."""
    blocks: tl.constexpr = (DV + BV - 1) // BV
    memory = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row, head = memory // heads, memory % heads
    i_k, i_v, i_t = tl.arange(0, BK), block * BV + tl.arange(0, BV), tl.arange(0, BT)
    within = (i_k < DK)[:, None] & (i_v < DV)[None, :]
    offsets = i_k[:, None] * DV + i_v[None, :]
    matrix = tl.load(first_M + memory * DK * DV + offsets, mask=within, other=0.0)
    own_z = tl.load(first_z + memory * DK + i_k, mask=i_k < DK, other=0.0)
    for segment in range(0, segments):
        slot = memory * segments + segment
        start = slot * 0 + segment * segment_size  # 64 bits
        length = tl.minimum(segment_size, tokens - segment * segment_size)
        if KEEP:
            tl.store(states + slot * DK * DV + offsets, matrix, mask=within)
            tl.store(zs + slot * DK + i_k, own_z, mask=i_k + block * BK < DK)  # once
        for g in range(0, group):
            reader = head * group + g
            at_q = q + row * q_b + reader * q_h
            at_out = out + (row * heads * group + reader) * tokens * DV + i_v[None, :]
            for offset in range(0, length, BT):
                t = start + offset + i_t
                real = t < start + length
                phi = _features(at_q, t, q_t, real, DK, BK)
                inverse, _ = _inverse(phi, own_z, eps)
                value = tl.dot(phi, matrix, input_precision=PRECISION) * inverse[:, None]
                tl.store(at_out + t[:, None] * DV, value, mask=real[:, None] & (i_v < DV)[None, :])
        new, new_z = matrix, own_z
        for offset in range(0, length, BT):
            t = start + offset + i_t
            real = _kept(mask, row, tokens, t, t < start + length, HAS_MASK)
            phi = _features(k + row * k_b + head * k_h, t, k_t, real, DK, BK)
            at_v = v + row * v_b + head * v_h + t[:, None] * v_t + i_v[None, :]
            value = tl.load(at_v, mask=real[:, None] & (i_v < DV)[None, :], other=0.0)
            value = value.to(tl.float32)
            if DELTA:
                inverse, _ = _inverse(phi, own_z, eps)
                value -= tl.dot(phi, matrix, input_precision=PRECISION) * inverse[:, None]
            new += tl.dot(tl.trans(phi), value, input_precision=PRECISION)
            new_z += tl.sum(phi, 0)
        matrix, own_z = new, new_z
    tl.store(last_M + memory * DK * DV + offsets, matrix, mask=within)
    tl.store(last_z + memory * DK + i_k, own_z, mask=i_k + block * BK < DK)


@triton.jit
def _settled(x, HIP: tl.constexpr):
    """Return x after this thread's stores have arrived: on AMD a barrier alone does not wait for
    them. x must be spread over all threads."""
    if HIP:
        return tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        return x


@triton.jit
def _total(parts, blocks, DK: tl.constexpr, BK: tl.constexpr):
    """Compute the sum of what the programs of a memory left of the gradient of z."""
    i_k = tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    for block in range(0, blocks):
        total += tl.load(parts + block * DK + i_k, mask=i_k < DK, other=0.0)
    return total


@triton.jit
def _left(
    grad, grad_z, grads_z, arrived, place, block, i_k,
    blocks: tl.constexpr, DK: tl.constexpr, HIP: tl.constexpr,
):  # fmt: skip
    """Leave this program's part of the gradient of z, and count it in, with all that it has stored
    before. Gives `grad`, from which the count cannot be parted, and how many were there earlier."""
    tl.store(grads_z + (place * blocks + block) * DK + i_k, grad_z, mask=i_k < DK)
    grad = _settled(grad, HIP)
    tl.debug_barrier()  # all threads have stored before one of them counts
    earlier = tl.atomic_add(arrived + place, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return grad, earlier


@triton.jit
def _removed_bwd(
    grad, grad_z, matrix, own_z, at_k, mask, row, tokens, start, length, k_t, eps,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take from the gradient of M after a segment what the delta rule took off there; and add to
    that of z."""
    new = grad
    for offset in range(0, length, BT):
        t = start + offset + tl.arange(0, BT)
        real = _kept(mask, row, tokens, t, t < start + length, HAS_MASK)
        phi = _features(at_k, t, k_t, real, DK, BK)
        inverse, denominator = _inverse(phi, own_z, eps)
        change = tl.dot(phi, grad, input_precision=PRECISION)
        previous = tl.dot(phi, matrix, input_precision=PRECISION)
        share = tl.sum(change * previous, 1) * inverse * inverse
        share = tl.where(denominator >= eps, share, 0.0)
        grad_z += tl.sum(share[:, None] * phi, 0)
        change = change * inverse[:, None]
        new -= tl.dot(tl.trans(phi), change, input_precision=PRECISION)
    return new, grad_z


@triton.jit
def _reads_bwd(
    new, grad_z, at_q, at_d, at_dq, own_states, own_z, start, length, block, i_v, q_t, d_t, eps,
    blocks: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    CV: tl.constexpr, CT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of M and z what one head's queries read of them, and compute this
    program's share of the queries' own."""
    for offset in range(0, length, BT):
        t = start + offset + tl.arange(0, BT)
        real = t < start + length
        phi = _features(at_q, t, q_t, real, DK, BK)
        inverse, _ = _inverse(phi, own_z, eps)
        at = at_d + t[:, None] * d_t + i_v[None, :]
        value = tl.load(at, mask=real[:, None] & (i_v < DV)[None, :], other=0.0)
        value = value.to(tl.float32) * inverse[:, None]
        new += tl.dot(tl.trans(phi), value, input_precision=PRECISION)
    for offset in range(block * CT, length, blocks * CT):
        t = start + offset + tl.arange(0, CT)
        phi, share = _queries_bwd(
            at_q, at_d, at_dq, own_states, own_z, t, t < start + length, q_t, d_t, eps,
            DK, DV, BK, CV, CT, PRECISION,
        )  # fmt: skip
        grad_z += tl.sum(share[:, None] * phi, 0)
    return new, grad_z


@triton.jit
def scan_bwd_kernel(
    q, k, v, mask, states, zs, dout, last_dM, last_dz,
    dq, dk, dv, first_dM, first_dz, grads, grads_z, arrived,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t,
    tokens, segment_size, segments, heads, group, eps,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    CV: tl.constexpr, CT: tl.constexpr, DELTA: tl.constexpr, HAS_MASK: tl.constexpr,
    HIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute all gradients, from the last segment to the first.

    grads `(B, Hkv, N, Dk, Dv)` is E after each segment, grads_z `(B, Hkv, N + 1, blocks, Dk)`
    each program's part of the gradient of z, arrived `(B, Hkv, N + 1)` how many programs left
    theirs: slot s + 1 after segment s, slot 0 before the first. CV and CT: values and tokens of
    a tile where all value channels are walked.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    memory = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row, head = memory // heads, memory % heads
    i_k, i_v = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    within = (i_k < DK)[:, None] & (i_v < DV)[None, :]
    offsets = i_k[:, None] * DV + i_v[None, :]
    at_k, at_v = k + row * k_b + head * k_h, v + row * v_b + head * v_h
    at_dk, at_dv = dk + memory * tokens * DK, dv + memory * tokens * DV
    grad = tl.load(last_dM + memory * DK * DV + offsets, mask=within, other=0.0)
    grad_z = tl.load(last_dz + memory * DK + i_k, mask=i_k + block * BK < DK, other=0.0)  # once
    for step in range(0, segments):
        segment = segments - 1 - step
        slot = memory * segments + segment
        own_states, own_grads = states + slot * DK * DV, grads + slot * DK * DV
        start = slot * 0 + segment * segment_size  # 64 bits
        length = tl.minimum(segment_size, tokens - segment * segment_size)
        own_z = tl.load(zs + slot * DK + i_k, mask=i_k < DK, other=0.0)

        after = slot + memory + 1
        tl.store(own_grads + offsets, grad, mask=within)
        grad, earlier = _left(grad, grad_z, grads_z, arrived, after, block, i_k, blocks, DK, HIP)
        if earlier == blocks - 1:
            total = _total(grads_z + after * blocks * DK, blocks, DK, BK)
            for offset in range(0, length, CT):
                t = start + offset + tl.arange(0, CT)
                inside = t < start + length
                real = _kept(mask, row, tokens, t, inside, HAS_MASK)
                _keys_bwd(
                    at_k, at_v, at_dk, at_dv, own_states, own_grads, own_z, total,
                    t, inside, real, k_t, v_t, eps, DK, DV, BK, CV, CT, DELTA, False, PRECISION,
                )  # fmt: skip

        new = grad
        if DELTA:
            new, grad_z = _removed_bwd(
                grad, grad_z, tl.load(own_states + offsets, mask=within, other=0.0), own_z, at_k,
                mask, row, tokens, start, length, k_t, eps, DK, BK, BT, HAS_MASK, PRECISION,
            )  # fmt: skip
        for g in range(0, group):
            reader = head * group + g
            new, grad_z = _reads_bwd(
                new, grad_z, q + row * q_b + reader * q_h, dout + row * d_b + reader * d_h,
                dq + (row * heads * group + reader) * tokens * DK, own_states, own_z, start, length,
                block, i_v, q_t, d_t, eps, blocks, DK, DV, BK, BT, CV, CT, PRECISION,
            )  # fmt: skip
        grad = new
    tl.store(first_dM + memory * DK * DV + offsets, grad, mask=within)
    before = memory * (segments + 1)
    grad, earlier = _left(grad, grad_z, grads_z, arrived, before, block, i_k, blocks, DK, HIP)
    if earlier == blocks - 1:
        total = _total(grads_z + before * blocks * DK, blocks, DK, BK)
        tl.store(first_dz + memory * DK + i_k, total, mask=i_k < DK)
