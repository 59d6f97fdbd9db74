"""Reading and writing all segments of a sequence (Infini-attention), forward and backward.

`scan` takes one of two paths with the same results. "fused" is one launch a pass: a program walks
over the segments with its part of the memory in registers. "launches" (`infini.states` and
`infini.lookup`) sums every segment in parallel, walks over the segments' sums, and reads in
parallel: three or four launches, each of them small programs. Shapes as in `infini`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import infini
from . import infini_scan_kernels as kernels
from .launch import flags, is_hip, on_device_of, rows
from .namespace import add_op_namespace_prefix
from .tiles import MAX_HEAD_DIM, Tiles, infini_tiles, precision

__all__ = ["scan"]

PATHS = ("auto", "fused", "launches")
# The path that `scan` takes: tests and benchmarks set another than "auto".
path = "auto"


@cache
def _multiprocessors(device_type: str, index: int | None) -> int:
    if device_type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(index or 0).multi_processor_count)


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU (compute units on AMD); 1 for the interpreter on a CPU."""
    return _multiprocessors(device.type, device.index)


def fuses(M: Tensor, dtype: torch.dtype, delta: bool, keep: bool) -> bool:
    """Tell whether one launch a pass keeps the device busy.

    A program of the fused path owns `BLOCK_V` value channels of one memory for the whole
    sequence, so there are B * Hkv * ceil(Dv / BLOCK_V) of them whatever its length. They are
    enough where they are no fewer than the device's multiprocessors; below that the path of
    several launches is taken, which is also parallel over segments and tokens. So it is where
    gradients through the delta rule are wanted (`keep`) at more than half of the largest head
    dim: the fused backward spills registers there. The rule counts programs and nothing else: no
    GPU has run either path yet.
    """
    if path != "auto":
        return path == "fused"
    batch, heads, keys, values = M.shape
    if delta and keep and keys > MAX_HEAD_DIM[dtype] // 2:
        return False
    passes = (infini_tiles(x, keys, values, dtype, is_hip()) for x in ("scan", "scan_bwd"))
    programs = batch * heads * min(_blocks(tiles, values) for tiles in passes)
    return programs >= multiprocessors(M.device)


def _blocks(tiles: Tiles, values: int) -> int:
    """Count the programs of a memory."""
    return max(1, triton.cdiv(values, tiles.values))


def scan(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None,
    segment_size: int, delta: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Read each segment with the memory before it, then write it: `(B, H, T, Dv)` in float32, and
    the memory after the last segment."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, M, z))
    if fuses(M, _widest(q, k, v), delta, keep):
        return fused(q, k, v, M, z, mask, segment_size, delta, eps, keep)[:3]
    states, zs = infini.states(k, v, M, z, mask, segment_size, delta, eps)
    out = infini.lookup(q, states, zs, segment_size, eps)
    # Copies: a view would keep the states of all segments alive.
    return out, states[:, :, -1].clone(), zs[:, :, -1].clone()


def _widest(*inputs: Tensor) -> torch.dtype:
    """Choose float32 where any of the inputs is: the dtype that tiles and precision go by."""
    full = any(x.dtype == torch.float32 for x in inputs)
    return torch.float32 if full else inputs[0].dtype


def _kept(k: Tensor, M: Tensor, segment_size: int, keep: bool) -> list[int]:
    """Return the shape of the states: one slot a segment, or none."""
    segments = (k.shape[2] + segment_size - 1) // segment_size
    return [*M.shape[:2], segments if keep else 0, *M.shape[2:]]


@torch.library.custom_op(add_op_namespace_prefix("infini_scan"), mutates_args=())
def fused(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None,
    segment_size: int, delta: bool, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute `scan` in one launch; after its three results the memory before each segment, M and
    z, if `keep` (the backward needs it; without it nothing that grows with the sequence is stored
    but what was read)."""
    batch, readers, tokens, keys = q.shape
    heads, values = M.shape[1], M.shape[3]
    shape = _kept(k, M, segment_size, keep)
    out = torch.empty(batch, readers, tokens, values, device=q.device, dtype=torch.float32)
    states = torch.empty(shape, device=q.device, dtype=torch.float32)
    zs = torch.empty(shape[:4], device=q.device, dtype=torch.float32)
    last_M, last_z = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (M, z))
    if not batch * heads * tokens:
        return out, last_M.copy_(M), last_z.copy_(z), states, zs
    q, k, v = rows(q), rows(k), rows(v)
    dtype = _widest(q, k, v)
    tiles = infini_tiles("scan", keys, values, dtype, is_hip())
    with on_device_of(q):
        kernels.scan_kernel[(batch * heads * _blocks(tiles, values),)](
            q, k, v, flags(mask, k), M.contiguous(), z.contiguous(), out, states, zs, last_M,
            last_z, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            tokens, segment_size, triton.cdiv(tokens, segment_size), heads, readers // heads, eps,
            DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BT=tiles.tokens, DELTA=delta,
            HAS_MASK=mask is not None, KEEP=keep, PRECISION=precision(dtype, is_hip()),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, last_M, last_z, states, zs


@fused.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, mask: Tensor | None,
    segment_size: int, delta: bool, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _kept(k, M, segment_size, keep)
    return (
        q.new_empty((*q.shape[:3], M.shape[3]), dtype=torch.float32),
        M.new_empty(M.shape), z.new_empty(z.shape), M.new_empty(shape), z.new_empty(shape[:4]),
    )  # fmt: skip


@torch.library.custom_op(add_op_namespace_prefix("infini_scan_backward"), mutates_args=())
def fused_backward(
    dout: Tensor, dM: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    states: Tensor, zs: Tensor, segment_size: int, delta: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, and of M and z before the first segment."""
    batch, readers, tokens, keys = q.shape
    heads, segments, values = states.shape[1], states.shape[2], states.shape[4]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    first_dM, first_dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dM, dz))
    if not batch * heads * tokens:
        return dq, dk, dv, first_dM.copy_(dM), first_dz.copy_(dz)
    q, k, v, dout = rows(q), rows(k), rows(v), rows(dout)
    dtype = _widest(q, k, v)
    tiles = infini_tiles("scan_bwd", keys, values, dtype, is_hip())
    across = infini_tiles("scan_bwd_across", keys, values, dtype, is_hip())
    blocks = _blocks(tiles, values)
    grads = torch.empty_like(states)
    grads_z = states.new_empty(batch, heads, segments + 1, blocks, keys)
    arrived = torch.zeros(batch, heads, segments + 1, dtype=torch.int32, device=q.device)
    with on_device_of(q):
        kernels.scan_bwd_kernel[(batch * heads * blocks,)](
            q, k, v, flags(mask, k), states, zs, dout, dM.contiguous(), dz.contiguous(),
            dq, dk, dv, first_dM, first_dz, grads, grads_z, arrived,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3],
            tokens, segment_size, segments, heads, readers // heads, eps,
            DK=keys, DV=values, BK=tiles.keys, BV=tiles.values, BT=tiles.tokens,
            CV=across.values, CT=across.tokens, DELTA=delta, HAS_MASK=mask is not None,
            HIP=is_hip(), PRECISION=precision(dtype, is_hip()), num_warps=tiles.warps,
            num_stages=tiles.stages,
        )  # fmt: skip
    return dq, dk, dv, first_dM, first_dz


@fused_backward.register_fake
def _(
    dout: Tensor, dM: Tensor, dz: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    states: Tensor, zs: Tensor, segment_size: int, delta: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, first_dM, first_dz = (x.new_empty(x.shape) for x in (q, k, v, dM, dz))
    return dq, dk, dv, first_dM, first_dz


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, mask, ctx.segment_size, ctx.delta, ctx.eps, ctx.keep = inputs
    states, zs = output[3:]
    ctx.mark_non_differentiable(states, zs)
    ctx.save_for_backward(q, k, v, mask, states, zs)


def _grad(ctx: Any, dout: Tensor, dM: Tensor, dz: Tensor, *_: Any) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("infini_scan was called with keep=False and kept nothing to go back by")
    grads = fused_backward(
        dout, dM, dz, *ctx.saved_tensors, ctx.segment_size, ctx.delta, ctx.eps
    )  # fmt: skip
    return (*grads, None, None, None, None, None)


fused.register_autograd(_grad, setup_context=_save)
