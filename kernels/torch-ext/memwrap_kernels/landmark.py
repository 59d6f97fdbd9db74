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

from . import landmark_bwd_kernels as bwd_kernels
from . import landmark_decode_kernels as decode_kernels
from . import landmark_kernels as kernels
from .launch import flags, is_hip, on_device_of, rows, rule
from .namespace import add_op_namespace_prefix
from .tiles import MAX_HEAD_DIM, landmark_tiles, padded

__all__ = ["attention", "retrieved", "unsupported"]

_LOG2E = 1.4426950408889634


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    scaling: float | None = None,
    places: Tensor | None = None,
    landmark: Tensor | None = None,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the grouped softmax over the own section and the landmarks of earlier ones.

    Args:
        q, k, v: as above, landmarks included, rotated; bfloat16, float16 or float32, all of one.
        block_size: tokens of a section beside its landmark; any number from 1 on.
        scaling: of the scores; `D ** -0.5` by default.
        places: `(B, Tq)` positions of the queries among the keys; the last Tq by default.
        landmark: `(B, Tq)` bool, queries that are landmarks and do not see their own key; by
            place by default.
        valid: `(B, Tk)` bool, keys that are no padding. An earlier section without a token has no
            share.
        documents: `(B, N)`, the document of each section; the sections of one lie together.
        softcap, window: must be None.

    Returns:
        Output `(B, H, Tq, D)` in q's dtype, and the log-sum-exp of the outer softmax `(B, H, Tq)`
        in float32. Both are differentiable. A query that sees nothing gives 0 and the smallest
        number.

    Raises:
        ValueError: for what `unsupported` names, and shapes that do not fit.
    """
    reason = unsupported(q, k, v, softcap, window)
    if reason:
        raise ValueError(f"The kernels of Landmark attention cannot do this: {reason}.")
    _check(q, k, v, block_size, places)
    lasts = None
    if places is not None or landmark is not None:
        if places is None:
            places = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
            places = places.expand(q.shape[0], -1)
        if landmark is None:
            landmark = places % (block_size + 1) == block_size
        lasts, places = (places - landmark.long()).int(), places.int()
    starts = None if documents is None else _starts(q, k, block_size, places, documents)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = forward(q, k, v, places, lasts, starts, valid, block_size, scale)
    return out, lse.clamp_min(torch.finfo(torch.float32).min)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None, window: int | None = None
) -> str:
    """Tell why the kernels cannot take a call; empty if they can."""
    if softcap is not None or window is not None:
        return "a soft cap or a window"
    if q.dtype not in MAX_HEAD_DIM or k.dtype != q.dtype or v.dtype != q.dtype:
        return (
            f"q, k and v in {q.dtype}, {k.dtype} and {v.dtype}; they take bfloat16, float16 or "
            "float32, all of one"
        )
    if v.shape[-1] != k.shape[-1]:
        return f"keys and values of {k.shape[-1]} and {v.shape[-1]} channels"
    limit = 64 if is_hip() or q.dtype == torch.float32 else MAX_HEAD_DIM[q.dtype]
    if q.shape[-1] > limit:
        return f"a head dim of {q.shape[-1]}; with {q.dtype} it goes up to {limit}"
    return ""


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int, places: Tensor | None) -> None:
    if block_size < 1:
        raise ValueError(f"`block_size` is {block_size}; it must be at least 1.")
    fits = q.dim() == 4 and k.dim() == 4 and v.shape == k.shape and k.shape[0] == q.shape[0]
    if not fits or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k and v are {list(q.shape)}, {list(k.shape)} and {list(v.shape)}; they must be "
            "(B, H, Tq, D) and twice (B, Hkv, Tk, D), with H a multiple of Hkv."
        )
    if places is None and q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries stand behind {k.shape[2]} keys; give `places`.")


def _starts(
    q: Tensor, k: Tensor, block_size: int, places: Tensor | None, documents: Tensor
) -> Tensor:
    """Tell where each query's document begins, `(B, Tq)`: documents are runs of sections."""
    index = torch.arange(1, documents.shape[1], device=documents.device)
    begins = torch.where(documents[:, 1:] != documents[:, :-1], index, 0)
    first = torch.nn.functional.pad(begins, (1, 0)).cummax(1).values
    if places is None:
        places = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        places = places.expand(q.shape[0], -1)
    section = places.long() // (block_size + 1)
    return (first.gather(1, section) * (block_size + 1)).int()


def _constants(
    kernel: str, q: Tensor, block_size: int, placed: bool, has_starts: bool,
    has_valid: bool,
) -> dict[str, Any]:  # fmt: skip
    width = q.shape[-1]
    tiles = landmark_tiles(kernel, width, block_size, q.dtype, is_hip())
    return {
        "M": block_size, "D": width, "BD": tiles.keys, "BM": tiles.tokens, "BN": tiles.values,
        "JOINED": block_size % tiles.values != 0, "PLACED": placed, "HAS_STARTS": has_starts,
        "HAS_VALID": has_valid,
        "PRECISION": rule(q.dtype, is_hip()), "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }  # fmt: skip


def _optional(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Make dense tensors; any other in place of none (a pointer that is never read)."""
    return [like if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op(add_op_namespace_prefix("landmark"), mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor | None, lasts: Tensor | None,
    starts: Tensor | None, valid: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `attention` with everything given: `lasts` are the last positions that queries may
    see, `starts` the first ones, all `(B, Tq)` in int32. Its log-sum-exp of nothing is -inf."""
    batch, readers, queries, _ = q.shape
    heads, tokens = k.shape[1], k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    q, k, v = rows(q), rows(k), rows(v)
    present = (places is not None, starts is not None, valid is not None)
    given = _constants("forward", q, block_size, *present)
    with on_device_of(q):
        kernels.forward_kernel[(triton.cdiv(queries, given["BM"]), batch * readers)](
            q, k, v, *_optional(lse, places, lasts, starts), flags(valid, q), out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], queries, tokens, heads,
            readers // heads, scale * _LOG2E, **given,
        )  # fmt: skip
    return out, lse


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, places: Tensor | None, lasts: Tensor | None,
    starts: Tensor | None, valid: Tensor | None, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("landmark_backward"), mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None,
    lasts: Tensor | None, starts: Tensor | None, valid: Tensor | None, out: Tensor, lse: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k and v: one pass for the queries, one for the keys and
    values."""
    batch, readers, queries, _ = q.shape
    heads, tokens = k.shape[1], k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not lse.numel() or not q.numel():
        return dq, dk.zero_(), dv.zero_()
    q, k, v, dout, dlse = rows(q), rows(k), rows(v), rows(dout), dlse.contiguous()
    where = (*_optional(lse, places, lasts, starts), flags(valid, q))
    present = (places is not None, starts is not None, valid is not None)
    deltas = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (queries, tokens, heads, readers // heads, scale * _LOG2E, scale)
    with on_device_of(q):
        given = _constants("query_bwd", q, block_size, *present)
        bwd_kernels.query_bwd_kernel[(triton.cdiv(queries, given["BM"]), batch * readers)](
            q, k, v, *where, out, lse, dout, dlse, dq, deltas, *strides, *sizes, **given
        )
        given = _constants("key_bwd", q, block_size, *present)
        sections = triton.cdiv(tokens, block_size + 1) * triton.cdiv(block_size, given["BN"])
        bwd_kernels.key_bwd_kernel[(sections, batch * heads)](
            q, k, v, *where, lse, deltas, dout, dk, dv, *strides, *sizes, **given
        )
    return dq, dk, dv


@backward.register_fake
def _(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None,
    lasts: Tensor | None, starts: Tensor | None, valid: Tensor | None, out: Tensor, lse: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    grads = backward(dout, dlse, *ctx.saved_tensors, ctx.block_size, ctx.scale)
    return (*grads, *[None] * 6)


forward.register_autograd(_grad, setup_context=_save)


def retrieved(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    landmarks: Tensor,
    valid: Tensor,
    ids: Tensor,
    scaling: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Read chosen blocks without gradients: decoding. No block is gathered first.

    Args:
        q: `(B, H, T, R, Dk)`, the query as each of its blocks sees it.
        keys, values: `(B, Hkv, N, m, Dk)` and `(B, Hkv, N, m, Dv)`, on q's device.
        landmarks: `(B, Hkv, N, Dk)`.
        valid: `(B, N, m)` bool; a block without a token has no share.
        ids: `(B, H, T, R)`, or `(B, H, 1, R)` for all queries; N for none.
        scaling, softcap: of the scores.

    Returns:
        The output `(B, H, T, Dv)` in the values' dtype, and the log of the landmarks' sum
        `(B, H, T)` in float32, the smallest number where there is no block.
    """
    out, lse = retrieved_op(q, keys, values, landmarks, valid, ids, scaling, softcap or 0.0)
    return out, lse.clamp_min(torch.finfo(torch.float32).min)


@torch.library.custom_op(add_op_namespace_prefix("landmark_retrieved"), mutates_args=())
def retrieved_op(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, ids: Tensor,
    scaling: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `retrieved`; a soft cap of 0 is none."""
    batch, readers, queries, chosen, width = q.shape
    heads, blocks, size, values_width = values.shape[1:]
    out = torch.empty(
        (batch, readers, queries, values_width), dtype=values.dtype, device=values.device
    )
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    if not blocks or not chosen:
        return out.zero_(), lse.fill_(-torch.inf)
    q = rows(q)
    dense = [x.contiguous() for x in (keys, values, landmarks)]
    wide, wide_values = padded(width), padded(values_width)
    tokens = min(padded(size), max(16, 4096 // max(wide, wide_values)))
    with on_device_of(q):
        decode_kernels.retrieved_kernel[(queries, batch * readers)](
            q, *dense, flags(valid, q), ids.contiguous(), out, lse, *q.stride()[:4], queries,
            heads, readers // heads, blocks, chosen, ids.shape[2], scaling, softcap or 1.0,
            M=size, D=width, DV=values_width, BD=wide, BV=wide_values, BN=tokens,
            CAPPED=softcap > 0.0, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out, lse


@retrieved_op.register_fake
def _(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, ids: Tensor,
    scaling: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = values.new_empty((*q.shape[:3], values.shape[-1]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)
