"""One softmax over several groups of keys, each seen by queries of its own, on the CPU's flash
kernel.

The kernel gives each group's output and the log of its softmax's sum, by which outputs merge
exactly. Its backward pass computes weights from such a log; given the log of the sum over all
groups, it gives the gradients of the joint softmax. Queries are cut into pieces, each of which
attends to the keys alone that any of its queries sees.

Shapes: B batch, H query heads, Hkv KV heads (query head h belongs to KV head `h // G`, G = H /
Hkv), T queries, K keys of a group, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memwrap.ops import accumulation_dtype

# A power of two takes the same time for all scores; torch's exponential takes many times as long
# for those that are hidden or far below the largest.
LOG2_E = math.log2(math.e)
PIECE = 128  # queries that attend together
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Sight:
    """Part of a group's keys that a piece of the queries sees.

    Attributes:
        keys: the columns that any of them sees.
        mask: `(B, 1, G * T, K)`, added to the scores; None: all see all of these.
        blind: `(B, 1, G * T)` bool, queries that see nothing; None: there are none.
    """

    keys: slice
    mask: Tensor | None
    blind: Tensor | None


@dataclass(frozen=True)
class Group:
    """A group of keys `(B, Hkv, K, D)`, their values, the queries `(B, H, T, D)` that see them, and
    what each piece of the queries sees of them (None: nothing)."""

    query: Tensor
    key: Tensor
    value: Tensor
    sights: Sequence[Sight | None]


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel takes such tensors."""
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
    )


def pieces(length: int) -> list[slice]:
    """Cut queries into pieces."""
    return [slice(a, min(a + PIECE, length)) for a in range(0, length, PIECE)]


def columns_seen(visible: Tensor) -> slice | None:
    """Find the columns from the first to the last that any query sees, by `visible` `(B, T, K)`;
    None: no query sees any."""
    columns = visible.flatten(0, 1).any(0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else None


def sights(visible: Tensor, groups: int, dtype: torch.dtype) -> list[Sight | None]:
    """Say for each piece of the queries what it sees, by `visible` `(B, T, K)` bool."""
    return [_sight(visible[:, piece], groups, dtype) for piece in pieces(visible.shape[1])]


def _sight(visible: Tensor, groups: int, dtype: torch.dtype) -> Sight | None:
    keys = columns_seen(visible)
    if keys is None:
        return None
    visible = visible[:, None, :, keys]
    if bool(visible.all()):
        return Sight(keys, None, None)
    seeing = visible.any(-1)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    blind = None if bool(seeing.all()) else ~seeing.repeat(1, 1, groups)
    return Sight(keys, mask.repeat(1, 1, groups, 1), blind)


def attend(
    groups: Sequence[Group],
    scaling: float,
    other: tuple[Tensor, Tensor] | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend in one softmax to groups of keys.

    Args:
        groups: of keys; a query that sees none at all gets zeros.
        scaling: of the scores.
        other: the output `(B, H, T, D)` of an attention to other keys and the log of its softmax's
            sum `(B, H, T)`, -inf for a query that has none; they take part too.
        width: channels of the output (default: all); groups may have more, behind these.

    Returns:
        The output `(B, T, H, D)`, and the log of the sum `(B, H, T)`, which has no gradient.
    """
    alone = len(groups) == 1 and other is None and not torch.is_grad_enabled()
    if alone and groups[0].query.shape[2] == 1 and groups[0].sights[0] is not None:
        return _decoded(groups[0], groups[0].sights[0], scaling, width)
    tensors = [t for g in groups for t in (g.query, g.key, g.value)]
    plan = [group.sights for group in groups]
    out, log = other if other is not None else (None, None)
    return _Attention.apply(plan, scaling, width, out, log, *tensors)


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attend for queries `(B, H, T, D)` to H heads of keys, with a mask that is added to the scores
    or none: the output and the log of each sum `(B, H, T)`, for `other` of `attend`; no gradient
    goes through it."""
    return _flash(query, key, value, attn_mask=mask, scale=scaling)


def attend_received(
    groups: Sequence[Group],
    scaling: float,
    counted: Tensor,
    width: int | None = None,
    other: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as `attend`, and sum the weights that the keys of the first group get from queries.

    Args:
        groups, scaling, width, other: as in `attend`.
        counted: `(B, T)` bool, queries that count.

    Returns:
        The output `(B, T, H, D)`, and without a gradient `(B, H, K)`, in float32 (or float64).
    """
    query = groups[0].query
    if torch.is_grad_enabled() or accumulation_dtype(query) != query.dtype:
        out, log = attend(groups, scaling, other, width)
        return out, _received(groups[0], scaling, log, counted)
    total = groups[0].key.shape[2]
    got = query.new_zeros(len(query), query.shape[1], total)
    outs = [
        _weighed(groups, number, piece, scaling, counted[:, piece], got, width, other)
        for number, piece in enumerate(pieces(query.shape[2]))
    ]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return out.transpose(1, 2), got


def _weighed(
    groups: Sequence[Group], number: int, piece: slice, scaling: float, counted: Tensor,
    got: Tensor, width: int | None, other: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Attend for a `piece` of the queries, of this `number`, by weights that are written out, `(B,
    H, T, D)`, and add those of the first group to what its keys `got`: the scores are computed
    once for both."""
    sights = [group.sights[number] for group in groups]
    seen = [(g, sight) for g, sight in zip(groups, sights, strict=True) if sight is not None]
    query, value = groups[0].query, groups[0].value
    heads, scores, logs = value.shape[1], [], []
    for group, sight in seen:
        folded = _folded(group.query[:, :, piece], heads) * (scaling * LOG2_E)
        scores.append(folded @ _columns(group.key, sight).mT)
        if sight.mask is not None:
            scores[-1] += sight.mask
    tops = [x.amax(-1, keepdim=True) for x in scores]
    if other is not None:
        logs = [_folded(other[1][:, :, piece, None], heads) * LOG2_E]
    length = piece.stop - piece.start
    if not tops + logs:
        return _first(torch.zeros_like(query[:, :, piece]), width)
    most = reduce(torch.maximum, tops + logs).clamp_min(torch.finfo(query.dtype).min)
    weights = [x.sub_(most).exp2_() for x in scores]
    shares = [(log - most).exp2() for log in logs]
    parts = [w @ _columns(g.value, sight) for w, (g, sight) in zip(weights, seen, strict=True)]
    parts = [_first(part, width) for part in parts]
    if other is not None:
        parts.append(shares[0] * _folded(other[0][:, :, piece], heads))
    amount = reduce(torch.add, [x.sum(-1, keepdim=True) for x in weights] + shares)
    share = amount.clamp_min(torch.finfo(amount.dtype).tiny).reciprocal()
    if sights[0] is not None:
        by_query = (share.unflatten(2, (-1, length)) * counted[:, None, None, :, None]).mT
        sums = by_query @ weights[0].unflatten(2, (-1, length))
        got[:, :, sights[0].keys] += sums.squeeze(3).flatten(1, 2)
    return _unfolded(reduce(torch.add, parts).mul_(share), length)


@torch.no_grad()
def _received(group: Group, scaling: float, log: Tensor, counted: Tensor) -> Tensor:
    """Sum the weights that the keys of a group get, from the log `(B, H, T)` of each query's sum:
    `(B, H, K)`."""
    query, key = group.query, group.key
    batch, heads, length, _ = query.shape
    total = log.new_zeros(batch, heads, key.shape[2])
    for sight, piece in zip(group.sights, pieces(length), strict=True):
        if sight is None:
            continue
        folded = _folded(query[:, :, piece], key.shape[1])
        scores = (folded @ _columns(key, sight).mT).to(log.dtype)
        most = log[:, :, piece].masked_fill(~counted[:, None, piece], torch.inf) * LOG2_E
        most = most.clamp_min(torch.finfo(most.dtype).min)
        scores = scores.mul_(scaling * LOG2_E).sub_(_folded(most, key.shape[1])[..., None])
        if sight.mask is not None:
            scores += sight.mask
        weights = scores.exp2_().unflatten(2, (-1, piece.stop - piece.start))
        total[:, :, sight.keys] += weights.sum(3).flatten(1, 2)
    return total


def _decoded(
    group: Group, sight: Sight, scaling: float, width: int | None
) -> tuple[Tensor, Tensor]:
    """Attend as `attend`, for one query a row: with as few operations as it takes."""
    query, key, value = group.query, _columns(group.key, sight), _columns(group.value, sight)
    folded = _folded(query, key.shape[1])
    out, log = _flash(folded, key, value, attn_mask=sight.mask, scale=scaling)
    out = out.reshape(len(out), 1, query.shape[1], -1)
    return _first(out, width), log.reshape(query.shape[:3])


def _columns(x: Tensor, sight: Sight) -> Tensor:
    """Take the columns of keys or values `(B, Hkv, K, D)` that are seen."""
    keys = sight.keys
    return x if keys.stop - keys.start == x.shape[2] else x[:, :, keys]


def _first(x: Tensor, width: int | None) -> Tensor:
    """Take the first channels."""
    return x if width is None or width == x.shape[-1] else x[..., :width]


def _folded(x: Tensor, heads: int) -> Tensor:
    """Lay the query heads of a KV head in rows: `(B, H, T, ...)` to `(B, Hkv, G * T, ...)`."""
    return x if x.shape[1] == heads else x.reshape(len(x), heads, -1, *x.shape[3:])


def _unfolded(x: Tensor, length: int) -> Tensor:
    """Undo `_folded`."""
    return x if x.shape[2] == length else x.reshape(len(x), -1, length, *x.shape[3:])


class _Attention(torch.autograd.Function):
    """The joint softmax and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, plan: list[Sequence[Sight | None]], scaling: float, width: int | None,
        other: Tensor | None, other_log: Tensor | None, *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        groups = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        query, heads = tensors[0], tensors[1].shape[1]
        wide = accumulation_dtype(query)
        outs, logs = [], []
        for number, piece in enumerate(pieces(query.shape[2])):
            out: Any = None
            log: Any = None
            for (q, k, v), sights in zip(groups, plan, strict=True):
                sight = sights[number]
                if sight is None:
                    continue
                part, part_log = _flash(
                    _folded(q[:, :, piece], heads), _columns(k, sight), _columns(v, sight),
                    attn_mask=sight.mask, scale=scaling,
                )  # fmt: skip
                if sight.blind is not None:
                    part_log = part_log.masked_fill(sight.blind, torch.finfo(part_log.dtype).min)
                part = _first(part, width)
                if out is None:
                    out, log = part, part_log
                else:
                    out, log = _merged(out.to(wide), log, part.to(wide), part_log)
            if out is None:  # nobody sees anything
                shape = len(query), query.shape[1], piece.stop - piece.start
                out = query.new_zeros(*shape, groups[0][2].shape[-1] if width is None else width)
                log = out.new_full(shape, torch.finfo(wide).min, dtype=wide)
            out, log = (_unfolded(x, piece.stop - piece.start) for x in (out, log))
            if other is not None and other_log is not None:
                given = other[:, :, piece].to(wide), other_log[:, :, piece].to(wide)
                out, log = _merged(out.to(wide), log, *given)
            outs.append(out.transpose(1, 2).to(query.dtype))
            logs.append(log)
        out, log = outs[0], logs[0]
        if len(outs) > 1:
            out, log = torch.cat(outs, 1), torch.cat(logs, 2)
        ctx.save_for_backward(out, log, other, other_log, *tensors)
        ctx.plan, ctx.scaling = plan, scaling
        ctx.mark_non_differentiable(log)
        return out, log

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        out, log, other, other_log, *tensors = ctx.saved_tensors
        groups = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        heads, width, pad = tensors[1].shape[1], out.shape[-1], torch.nn.functional.pad
        grads = [torch.zeros_like(t) for t in tensors]
        out, grad = out.transpose(1, 2), grad.to(out.dtype).transpose(1, 2)
        for number, piece in enumerate(pieces(out.shape[2])):
            g, o, total = (_folded(x[:, :, piece], heads) for x in (grad, out, log))
            for index, ((q, k, v), sights) in enumerate(zip(groups, ctx.plan, strict=True)):
                sight = sights[number]
                if sight is None:
                    continue
                more = (0, v.shape[-1] - width)
                made = _flash_backward(
                    pad(g, more), _folded(q[:, :, piece], heads), _columns(k, sight),
                    _columns(v, sight), pad(o, more), total, 0.0, False,
                    attn_mask=sight.mask, scale=ctx.scaling,
                )  # fmt: skip
                length = piece.stop - piece.start
                grads[3 * index][:, :, piece] += _unfolded(made[0], length)
                for grown, new in zip(grads[3 * index + 1 : 3 * index + 3], made[1:], strict=True):
                    grown[:, :, sight.keys] += new
        beside: tuple[Any, Any] = (None, None)
        if other is not None:
            share = (other_log - log).exp()[..., None]
            beside = share * grad, (share * (other - out) * grad).sum(-1)
        return None, None, None, *beside, *grads


def _merged(out: Tensor, log: Tensor, part: Tensor, part_log: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attentions; the first log is finite."""
    share = (part_log - log).sigmoid()[..., None]
    return torch.lerp(out, part.to(out.dtype), share), torch.logaddexp(log, part_log)
