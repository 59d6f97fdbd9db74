"""The compressive memory (Infini-attention) as two differentiable operators.

`states` writes all segments of a sequence and returns the memory before and after each;
`lookup` reads each segment with the memory before it. Shapes: q `(B, H, T, Dk)`, k
`(B, Hkv, T, Dk)`, v `(B, Hkv, T, Dv)`, M `(B, Hkv, Dk, Dv)`, z `(B, Hkv, Dk)`; states
`(B, Hkv, N + 1, Dk, Dv)` and `(B, Hkv, N + 1, Dk)` in float32, slot s before segment s.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import infini_kernels as kernels
from .launch import flags, is_hip, on_device_of, rows
from .namespace import add_op_namespace_prefix
from .tiles import infini_tiles, precision

__all__ = ["lookup", "states"]

EPS = 1e-10


def _outer(
    x: Tensor, y: Tensor | None, out: Tensor, out_z: Tensor | None, segment_size: int, *,
    heads: int, slots: int, first_slot: int = 0, z: Tensor | None = None,
    weight: Tensor | None = None, mask: Tensor | None = None, eps: float = EPS,
) -> None:  # fmt: skip
    """Launch `outer_kernel`: sums of outer products over each segment, into `out`,
    `out_z`."""
    batch, readers, tokens, keys = x.shape
    x = rows(x)
    other = x if y is None else rows(y)
    values = other.shape[-1]
    tiles = infini_tiles("outer", keys, values, x.dtype, is_hip())
    segments = triton.cdiv(tokens, segment_size)
    with on_device_of(x):
        kernels.outer_kernel[(segments * triton.cdiv(values, tiles.values), batch * heads)](
            x, other, flags(mask, x), x if z is None else z, x if weight is None else weight,
            out, out if out_z is None else out_z,
            *x.stride()[:3], *other.stride()[:3], slots, first_slot,
            tokens, segment_size, segments, heads, readers // heads, eps,
            DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BT=tiles.tokens,
            OWN=y is None, DIVIDE=z is not None, HAS_MASK=mask is not None,
            HAS_WEIGHT=weight is not None, WANT_Z=out_z is not None,
            PRECISION=precision(x.dtype, is_hip()),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def _transitions(
    k: Tensor, mask: Tensor | None, zs: Tensor, segment_size: int, eps: float
) -> Tensor:
    """Compute A_s of every segment, `(B, Hkv, N, Dk, Dk)`."""
    batch, heads, slots, keys = zs.shape
    a = torch.empty(batch, heads, slots - 1, keys, keys, device=k.device, dtype=torch.float32)
    # The slots of `a` are one fewer than those of z: one launch a layout, so z is cut to fit.
    _outer(
        k, None, a, None, segment_size, heads=heads, slots=slots - 1, mask=mask, eps=eps,
        z=zs[:, :, :-1].contiguous(),
    )  # fmt: skip
    return a


def _recur(states: Tensor, a: Tensor | None, reverse: bool) -> None:
    batch, heads, slots, keys, values = states.shape
    tiles = infini_tiles("recurrence", keys, values, states.dtype, is_hip())
    with on_device_of(states):
        kernels.recurrence_kernel[(triton.cdiv(values, tiles.values), batch * heads)](
            states, states if a is None else a, slots - 1,
            DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BC=min(tiles.keys, 32),
            REVERSE=reverse, HAS_A=a is not None, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


@torch.library.custom_op(add_op_namespace_prefix("infini_states"), mutates_args=())
def states(
    k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None, segment_size: int,
    delta: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write all segments: the memory before each and after the last, M and z."""
    batch, heads, tokens, keys = k.shape
    segments = triton.cdiv(tokens, segment_size)
    shape = (batch, heads, segments + 1, keys, v.shape[-1])
    memory = torch.empty(shape, device=k.device, dtype=torch.float32)
    zs = torch.empty(shape[:4], device=k.device, dtype=torch.float32)
    memory[:, :, 0], zs[:, :, 0] = M, z
    if not segments or not k.numel() or not v.numel():
        memory[:, :, 1:], zs[:, :, 1:] = 0.0, 0.0
        return memory, zs
    _outer(k, v, memory, zs, segment_size, heads=heads, slots=segments + 1, first_slot=1, mask=mask)
    zs = zs.cumsum(2)
    a = _transitions(k, mask, zs, segment_size, eps) if delta else None
    _recur(memory, a, reverse=False)
    return memory, zs


@states.register_fake
def _(
    k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None, segment_size: int,
    delta: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slots = (k.shape[2] + segment_size - 1) // segment_size + 1
    shape = (k.shape[0], k.shape[1], slots, k.shape[3], v.shape[3])
    return k.new_empty(shape, dtype=torch.float32), k.new_empty(shape[:4], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("infini_states_backward"), mutates_args=())
def states_backward(
    d_memory: Tensor, d_zs: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, memory: Tensor,
    zs: Tensor, segment_size: int, delta: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of k, v, and of M and z before the first segment."""
    batch, heads, tokens, keys = k.shape
    segments, values = memory.shape[2] - 1, v.shape[-1]
    grads = d_memory.contiguous().clone()
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not segments or not k.numel() or not v.numel():
        return dk.zero_(), dv.zero_(), grads[:, :, 0].clone(), d_zs[:, :, 0].clone()
    a = _transitions(k, mask, zs, segment_size, eps) if delta else None
    _recur(grads, a, reverse=True)
    k, v = rows(k), rows(v)
    tiles = infini_tiles("write_bwd", keys, values, k.dtype, is_hip())
    parts = triton.cdiv(segment_size, tiles.tokens)
    partial = torch.empty(
        batch, heads, segments, parts if delta else 0, keys, device=k.device, dtype=torch.float32
    )
    grads_z = d_zs

    def launch(only_z: bool) -> None:
        with on_device_of(k):
            kernels.write_bwd_kernel[(segments * parts, batch * heads)](
                k, v, flags(mask, k), memory, zs, grads, grads_z, dk, dv, partial,
                *k.stride()[:3], *v.stride()[:3], tokens, segment_size, segments, parts, heads, eps,
                DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BT=tiles.tokens, DELTA=delta,
                ONLY_Z=only_z, HAS_MASK=mask is not None, PRECISION=precision(k.dtype, is_hip()),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip

    if delta:
        launch(only_z=True)
        grads_z = torch.cat([d_zs[:, :, :-1] + partial.sum(3), d_zs[:, :, -1:]], dim=2)
    grads_z = grads_z.flip(2).cumsum(2).flip(2).contiguous()
    launch(only_z=False)
    return dk, dv, grads[:, :, 0].clone(), grads_z[:, :, 0].clone()


@states_backward.register_fake
def _(
    d_memory: Tensor, d_zs: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, memory: Tensor,
    zs: Tensor, segment_size: int, delta: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        k.new_empty(k.shape), v.new_empty(v.shape),
        memory.new_empty(memory[:, :, 0].shape), zs.new_empty(zs[:, :, 0].shape),
    )  # fmt: skip


def _save_states(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    k, v, _, _, mask, ctx.segment_size, ctx.delta, ctx.eps = inputs
    ctx.save_for_backward(k, v, mask, *output)


def _grad_states(ctx: Any, d_memory: Tensor, d_zs: Tensor) -> tuple[Any, ...]:
    grads = states_backward(
        d_memory, d_zs, *ctx.saved_tensors, ctx.segment_size, ctx.delta, ctx.eps
    )
    return (*grads, None, None, None, None)


states.register_autograd(_grad_states, setup_context=_save_states)


@torch.library.custom_op(add_op_namespace_prefix("infini_lookup"), mutates_args=())
def lookup(q: Tensor, memory: Tensor, zs: Tensor, segment_size: int, eps: float) -> Tensor:
    """Read each segment of q with its own slot: `(B, H, T, Dv)` in float32."""
    batch, readers, tokens, keys = q.shape
    heads, slots, values = memory.shape[1], memory.shape[2], memory.shape[4]
    out = torch.empty(batch, readers, tokens, values, device=q.device, dtype=torch.float32)
    if not out.numel() or not keys:
        return out.zero_()
    q, memory, zs = rows(q), memory.contiguous(), zs.contiguous()
    tiles = infini_tiles("lookup", keys, values, q.dtype, is_hip())
    group = readers // heads
    span = min(4 * tiles.tokens, tiles.tokens * triton.cdiv(segment_size, tiles.tokens))
    spans = triton.cdiv(segment_size, span)
    parts = triton.cdiv(tokens, segment_size) * spans * triton.cdiv(values, tiles.values)
    with on_device_of(q):
        kernels.lookup_kernel[(parts, batch * readers)](
            q, memory, zs, out, *q.stride()[:3], slots, tokens, segment_size, spans, span, heads,
            group, eps, DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BT=tiles.tokens,
            PRECISION=precision(q.dtype, is_hip()), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


@lookup.register_fake
def _(q: Tensor, memory: Tensor, zs: Tensor, segment_size: int, eps: float) -> Tensor:
    return q.new_empty((*q.shape[:3], memory.shape[-1]), dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("infini_lookup_backward"), mutates_args=())
def lookup_backward(
    dout: Tensor, q: Tensor, memory: Tensor, zs: Tensor, segment_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q and of every slot of M and z."""
    batch, readers, tokens, keys = q.shape
    heads, slots, values = memory.shape[1], memory.shape[2], memory.shape[4]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    segments = triton.cdiv(tokens, segment_size)
    d_memory, d_zs = torch.empty_like(memory), torch.empty_like(zs)
    d_memory, d_zs = d_memory.contiguous(), d_zs.contiguous()
    if not dout.numel() or not keys:
        return dq.zero_(), d_memory.zero_(), d_zs.zero_()
    d_memory[:, :, segments:], d_zs[:, :, segments:] = 0.0, 0.0
    q, dout, memory, zs = rows(q), rows(dout), memory.contiguous(), zs.contiguous()
    tiles = infini_tiles("lookup_bwd", keys, values, q.dtype, is_hip())
    group = readers // heads
    parts = triton.cdiv(segment_size, tiles.tokens)
    weight = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    with on_device_of(q):
        kernels.lookup_bwd_kernel[(segments * parts, batch * readers)](
            q, memory, zs, dout, dq, weight, *q.stride()[:3], *dout.stride()[:3], slots, tokens,
            segment_size, parts, heads, group, eps,
            DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BT=tiles.tokens,
            PRECISION=precision(q.dtype, is_hip()), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    _outer(
        q, dout, d_memory, d_zs, segment_size, heads=heads, slots=slots, z=zs, weight=weight,
        eps=eps,
    )  # fmt: skip
    return dq, d_memory, d_zs


@lookup_backward.register_fake
def _(
    dout: Tensor, q: Tensor, memory: Tensor, zs: Tensor, segment_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), memory.new_empty(memory.shape), zs.new_empty(zs.shape)


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, memory, zs, ctx.segment_size, ctx.eps = inputs
    ctx.save_for_backward(q, memory, zs)


def _grad_lookup(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return (*lookup_backward(dout, *ctx.saved_tensors, ctx.segment_size, ctx.eps), None, None)


lookup.register_autograd(_grad_lookup, setup_context=_save_lookup)
