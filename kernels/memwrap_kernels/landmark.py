"""Landmark attention as differentiable operators: the softmax of two levels.

Shapes: q `(B, H, Tq, D)`, k and v `(B, Hkv, Tk, D)`; query head h reads key head `h // (H / Hkv)`.
The queries are the last Tq of Tk positions. Positions are cut into sections of `block_size`
tokens and one landmark, from position 0 on; the last section may be incomplete.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from memwrap_kernels import landmark_kernels as kernels
from memwrap_kernels.launch import is_hip, on_device_of, rows, rule
from memwrap_kernels.tiles import MAX_HEAD_DIM, landmark_tiles

_LOG2E = 1.4426950408889634


def attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, *, scale: float | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Grouped softmax over the own section and the landmarks of earlier ones.

    Args:
        q, k, v: as above, landmarks included, rotated; bfloat16, float16 or float32, all of one.
        block_size: tokens of a section beside its landmark; any number from 1 on.
        scale: of the scores; `D ** -0.5` by default.
        starts: `(B, Tq)` integers, the first key position that each query may see: where its
            document begins, or Tk for padding, which sees nothing and returns 0. Documents lie
            one after the other; one that begins inside a section sees the rest of that section.

    Returns:
        Output `(B, H, Tq, D)` in q's dtype, and the log-sum-exp of the outer softmax `(B, H, Tq)`
        in float32 (-inf for padding). Both are differentiable.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a head dim that is too large.
    """
    _check(q, k, v, block_size, starts)
    own = q.shape[-1] ** -0.5 if scale is None else scale
    firsts = None if starts is None else starts.to(torch.int32)
    return forward(q, k, v, firsts, block_size, own)


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int, starts: Tensor | None) -> None:
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1.")
    if q.dtype not in MAX_HEAD_DIM or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must be of one dtype, "
            "bfloat16, float16 or float32."
        )
    fits = q.dim() == 4 and k.dim() == 4 and v.shape == k.shape and k.shape[0] == q.shape[0]
    if not fits or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3] or q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q, k and v are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}; they must be "
            "(B, H, Tq, D) and twice (B, Hkv, Tk, D), with H a multiple of Hkv and Tq <= Tk."
        )
    if q.shape[3] > MAX_HEAD_DIM[q.dtype]:
        raise ValueError(
            f"The head dim is {q.shape[3]}; with {q.dtype} it goes up to {MAX_HEAD_DIM[q.dtype]}."
        )
    if starts is not None and starts.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"starts is {list(starts.shape)}; it must be {[q.shape[0], q.shape[2]]} (B, Tq)."
        )


def _constants(kernel: str, q: Tensor, block_size: int, has_starts: bool) -> dict[str, Any]:
    width = q.shape[-1]
    own = landmark_tiles(kernel, width, block_size, q.dtype, is_hip())
    return {
        "M": block_size, "D": width, "BD": own.keys, "BM": own.tokens, "BN": own.values,
        "JOINED": block_size % own.values != 0, "HAS_STARTS": has_starts,
        "PRECISION": rule(q.dtype, is_hip()), "num_warps": own.warps,
        "num_stages": own.stages,
    }  # fmt: skip


@torch.library.custom_op("memwrap_kernels::landmark", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`attention` with everything given."""
    batch, readers, queries, width = q.shape
    heads, tokens = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    q, k, v = rows(q), rows(k), rows(v)
    given = _constants("forward", q, block_size, starts is not None)
    with on_device_of(q):
        kernels.forward_kernel[(triton.cdiv(queries, given["BM"]), batch * readers)](
            q, k, v, lse if starts is None else starts.contiguous(), out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], queries, tokens, heads,
            readers // heads, scale * _LOG2E, **given,
        )  # fmt: skip
    return out, lse


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("memwrap_kernels::landmark_backward", mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None,
    out: Tensor, lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v: one pass for the queries, one for the keys and values."""
    batch, readers, queries, _ = q.shape
    heads, tokens = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not lse.numel() or not q.numel():
        return dq, dk.zero_(), dv.zero_()
    q, k, v, dout, dlse = rows(q), rows(k), rows(v), rows(dout), dlse.contiguous()
    firsts = lse if starts is None else starts.contiguous()
    deltas = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (queries, tokens, heads, readers // heads, scale * _LOG2E, scale)
    with on_device_of(q):
        given = _constants("query_bwd", q, block_size, starts is not None)
        kernels.query_bwd_kernel[(triton.cdiv(queries, given["BM"]), batch * readers)](
            q, k, v, firsts, out, lse, dout, dlse, dq, deltas, *strides, *sizes, **given
        )
        given = _constants("key_bwd", q, block_size, starts is not None)
        sections = triton.cdiv(tokens, block_size + 1) * triton.cdiv(block_size, given["BN"])
        kernels.key_bwd_kernel[(sections, batch * heads)](
            q, k, v, firsts, lse, deltas, dout, dk, dv, *strides, *sizes, **given
        )
    return dq, dk, dv


@backward.register_fake
def _(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None,
    out: Tensor, lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, starts, *output)


def _grad(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    grads = backward(dout, dlse, *ctx.saved_tensors, ctx.block_size, ctx.scale)
    return (*grads, None, None, None)


forward.register_autograd(_grad, setup_context=_save)
