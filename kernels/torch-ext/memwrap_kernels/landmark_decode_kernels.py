"""Triton kernel of reading chosen blocks by Landmark attention: decoding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    """Compute `cap tanh(x / cap)`."""
    if CAPPED:
        # exp of a number that is at most 0: neither sign can overflow.
        small = tl.exp(-2.0 * tl.abs(x) / cap)
        value = cap * (1.0 - small) / (1.0 + small)
        x = tl.where(x < 0.0, -value, value)
    return x


@triton.jit
def _shift(most):
    """Return the largest score, or 0 where there is none."""
    return tl.where(most == -float("inf"), 0.0, most)


@triton.jit
def retrieved_kernel(
    q, keys, values, landmarks, valid, ids, out, lse,
    q_b, q_h, q_t, q_r, queries, heads, group, blocks, chosen, id_t, scale, cap,
    M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend for one query of one head over its blocks: a softmax over their landmarks, and in each
    one over its tokens."""
    readers = heads * group
    row = (tl.program_id(1) // readers).to(tl.int64)
    reader = (tl.program_id(1) % readers).to(tl.int64)
    t = tl.program_id(0).to(tl.int64)
    memory = (row * heads + reader // group) * blocks
    i_d, i_v = tl.arange(0, BD), tl.arange(0, BV)
    own_q = q + row * q_b + reader * q_h + t * q_t
    own_ids = ids + ((row * readers + reader) * id_t + tl.minimum(t, id_t - 1)) * chosen
    total = tl.zeros([BV], tl.float32)
    mass = tl.full([], 0.0, tl.float32)
    top = tl.full([], -float("inf"), tl.float32)
    for r in range(0, chosen):
        block = tl.load(own_ids + r).to(tl.int64)
        if block < blocks:
            query = tl.load(own_q + r * q_r + i_d, mask=i_d < D, other=0.0).to(tl.float32) * scale
            at = memory + block
            mark = tl.load(landmarks + at * D + i_d, mask=i_d < D, other=0.0).to(tl.float32)
            gate = _capped(tl.sum(query * mark, 0), cap, CAPPED)
            part = tl.zeros([BV], tl.float32)
            inner = tl.full([], 0.0, tl.float32)
            most = tl.full([], -float("inf"), tl.float32)
            for first in range(0, M, BN):
                n = first + tl.arange(0, BN)
                filled = tl.load(valid + (row * blocks + block) * M + n, mask=n < M, other=0) != 0
                place = at * M + n[:, None]
                key = tl.load(
                    keys + place * D + i_d[None, :], mask=filled[:, None] & (i_d < D)[None, :],
                    other=0.0,
                )  # fmt: skip
                x = _capped(tl.sum(key.to(tl.float32) * query[None, :], 1), cap, CAPPED)
                x = tl.where(filled, x, -float("inf"))
                new = tl.maximum(most, tl.max(x, 0))
                decay, weights = tl.exp(most - _shift(new)), tl.exp(x - _shift(new))
                value = tl.load(
                    values + place * DV + i_v[None, :], mask=filled[:, None] & (i_v < DV)[None, :],
                    other=0.0,
                )  # fmt: skip
                part = part * decay + tl.sum(weights[:, None] * value.to(tl.float32), 0)
                inner = inner * decay + tl.sum(weights, 0)
                most = new
            gate = tl.where(inner == 0.0, -float("inf"), gate)  # no token: no share
            new = tl.maximum(top, gate)
            decay, share = tl.exp(top - _shift(new)), tl.exp(gate - _shift(new))
            total = total * decay + part * (share / tl.where(inner == 0.0, 1.0, inner))
            mass = mass * decay + share
            top = new
    seen = mass > 0.0
    place = (row * readers + reader) * queries + t
    total = total / tl.where(seen, mass, 1.0)
    tl.store(out + place * DV + i_v, total.to(out.dtype.element_ty), mask=i_v < DV)
    tl.store(lse + place, tl.where(seen, top + tl.log(tl.where(seen, mass, 1.0)), -float("inf")))
