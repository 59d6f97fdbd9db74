"""Landmark attention in fast torch; formulas and shapes in `memwrap.ops.landmark`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memwrap.ops import accumulation_dtype
from memwrap.ops.buffers.host_prefetch import moved

# At most so many scores, or numbers of gathered keys, exist at once.
AT_ONCE = 2**26
# Above so many they are computed again in the backward pass, and not kept until then.
SAVED = 2**22


def attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, m: int, scaling: float, places: Tensor, landmark: Tensor,
    valid: Tensor | None, documents: Tensor | None, softcap: float | None, window: int | None,
    first: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `attention` in pieces of the queries.

    Args:
        first: the place of the first query where they are the last T of the keys; None: anywhere.
    """
    each = q.shape[0] * q.shape[1] * k.shape[2]
    step = max(1, AT_ONCE // max(1, each))
    # A query's keys end with its own place: pieces leave out what none of their queries sees.
    step = min(step, 16 * (m + 1)) if first is not None else step
    again, parts = each * q.shape[2] > SAVED, []
    for start in range(0, q.shape[2], step):
        piece = slice(start, start + step)
        stop = k.shape[2] if first is None else min(k.shape[2], first + start + step)
        args = (
            q[:, :, piece], k[:, :, :stop], v[:, :, :stop], m, scaling, places[:, piece],
            landmark[:, piece], None if valid is None else valid[:, :stop], documents, softcap,
            window,
        )  # fmt: skip
        parts.append(again_later(_attention, again, *args))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([log for _, log in parts], 2)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, m: int, scaling: float, places: Tensor, landmark: Tensor,
    valid: Tensor | None, documents: Tensor | None, softcap: float | None, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend by one softmax over `x_j + b_s`: with `b_s = x_{l_s} - logsumexp(x over N_s)` for an
    earlier section and 0 for the own one, the weights are those of the grouped softmax."""
    batch, heads, length, _ = q.shape
    total, groups = k.shape[2], heads // k.shape[1]
    short = -total % (m + 1)
    count = (total + short) // (m + 1)
    if valid is None:
        valid = torch.ones(batch, total, dtype=torch.bool, device=q.device)
    if short:
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, short)) for t in (k, v))
        valid = torch.nn.functional.pad(valid, (0, short))
    valid_blocks = valid.view(batch, 1, 1, 1, count, m + 1)
    x = q.unflatten(1, (-1, groups)).flatten(2, 3) @ k.transpose(-1, -2)
    x = capped(x.to(accumulation_dtype(q)) * scaling, softcap)
    x = x.view(batch, -1, groups, length, count, m + 1)
    tokens, gate, valid_tokens = x[..., :m], x[..., m], valid_blocks[..., :m]
    section, inside = (p[:, None, None, :, None] for p in (places // (m + 1), places % (m + 1)))
    index = torch.arange(count, device=q.device)
    earlier = (index < section) & valid_blocks[..., m] & valid_tokens.any(-1)
    own_section = index == section
    if documents is not None:
        query_documents = documents.gather(1, (places // (m + 1)).clamp_max(documents.shape[1] - 1))
        same = documents[:, None, :count] == query_documents[..., None]
        earlier = earlier & same[:, None, None]
    last = (inside - landmark[:, None, None, :, None].long())[..., None]
    row = torch.arange(m, device=q.device)
    seen = own_section[..., None] & (row <= last)
    if window is not None:
        seen = seen & (row > inside[..., None] - window)
    least = torch.finfo(x.dtype).min
    bias = gate - tokens.masked_fill(~valid_tokens, least).logsumexp(-1)
    bias = torch.where(earlier, bias, torch.zeros((), dtype=bias.dtype, device=bias.device))
    visible = ((earlier[..., None] | seen) & valid_tokens).expand(*x.shape[:-1], m)
    y = (tokens + bias[..., None]).masked_fill_(~visible, -torch.inf).flatten(-2)
    # One power for the weights and for their sum; of two, which is as fast for what is hidden.
    most = y.detach().amax(-1, keepdim=True).clamp_min(least)
    p = (y - most).mul(math.log2(math.e)).exp2()
    amount = p.sum(-1, keepdim=True)
    nothing = amount == 0
    amount = amount.masked_fill(nothing, 1.0)
    p = p / amount
    log = (most + amount.log()).masked_fill(nothing, least).squeeze(-1)
    values = v.unflatten(2, (count, m + 1))[..., :m, :].flatten(2, 3)
    out = p.to(v.dtype).flatten(2, 3) @ values
    return out.view(batch, heads, length, -1), log.view(batch, heads, length)


def retrieved_chunked(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, ids: Tensor,
    scaling: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `retrieved`: blocks gathered once for all queries, or for those that read them."""
    batch, heads, size = ids.shape[0], ids.shape[1], landmarks.shape[2]
    # A block without a token has no share, as one that is not there.
    some = torch.nn.functional.pad(valid.any(-1), (0, 1))[:, None, None]
    present = some.expand(*ids.shape[:3], -1).gather(-1, ids.clamp_max(size))
    kv = torch.arange(heads, device=ids.device) // (heads // landmarks.shape[1])
    row = torch.arange(batch, device=ids.device)[:, None] * landmarks.shape[1] + kv
    flat = row[..., None, None] * size + ids.clamp_max(size - 1)
    valid = valid[:, None].expand(-1, landmarks.shape[1], -1, -1)
    if ids.shape[2] == 1:
        outputs, gate = _read_gathered(q, keys, values, landmarks, valid, flat, scaling, softcap)
    else:
        outputs, gate = _read_grouped(
            q, keys, values, landmarks, valid, flat, present, scaling, softcap
        )
    gate = gate.masked_fill(~present, torch.finfo(gate.dtype).min)
    log = gate.logsumexp(-1)
    outer = (gate - log[..., None]).exp() * present
    return (outer.to(outputs.dtype)[..., None] * outputs).sum(-2), log


def _read_gathered(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, flat: Tensor,
    scaling: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read for `q` `(B, H, T, R, Dk)` each of its blocks, `(B, H, T, R, Dv)`, with the scores of
    their landmarks `(B, H, T, R)`; the blocks `flat` `(B, H, 1, R)` are those of all queries."""
    key, value, mark, filled = (_rows(x, flat, q.device) for x in (keys, values, landmarks, valid))
    gate = (q * mark).sum(-1)
    x = (key @ q[..., None]).squeeze(-1)
    wide = accumulation_dtype(q)
    gate, x = (capped(t.to(wide) * scaling, softcap) for t in (gate, x))
    inner = x.masked_fill(~filled, torch.finfo(wide).min).softmax(-1) * filled
    return (inner.to(value.dtype)[..., None, :] @ value).squeeze(-2), gate


def _read_grouped(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, flat: Tensor,
    present: Tensor, scaling: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read as `_read_gathered`, where each query has blocks of its own, `flat` and `present` `(B,
    H, T, R)`.

    The pairs of a query and a block are sorted by block, so that a block's keys are fetched for all
    that read it: queries move, which are m times smaller. Pairs stand in rows of one length, near
    the mean number of readers; a block with more readers has several rows.
    """
    pairs = present.flatten().nonzero().squeeze(1)
    if not len(pairs):  # a zero that still belongs to the graph
        nothing = q.sum(-1) * 0
        return nothing[..., None].expand(*q.shape[:4], values.shape[-1]).to(values.dtype), nothing
    blocks, inverse, readers = flat.flatten()[pairs].unique(return_inverse=True, return_counts=True)
    width = -(-len(pairs) // len(blocks))
    rows = (readers + width - 1) // width  # of each block
    order = inverse.argsort(stable=True)
    first = readers.cumsum(0) - readers
    rank = torch.arange(len(pairs), device=q.device) - first[inverse[order]]
    start = (rows.cumsum(0) - rows)[inverse[order]] * width
    slot = start + rank
    # Places of the rows without a pair repeat the first one: what they find is not read.
    total = int(rows.sum()) * width
    source = torch.zeros(total, dtype=torch.long, device=q.device).scatter(0, slot, pairs[order])
    x = q.flatten(0, 3).index_select(0, source).view(-1, width, q.shape[-1])
    row_blocks = blocks.repeat_interleave(rows)
    key, value, mark, filled = (
        _rows(t, row_blocks, q.device) for t in (keys, values, landmarks, valid)
    )
    wide = accumulation_dtype(q)
    gate = (x @ mark[..., None]).squeeze(-1)
    scores = x @ key.transpose(-1, -2)
    gate, scores = (capped(t.to(wide) * scaling, softcap) for t in (gate, scores))
    if bool(filled.all()):  # as mostly: nothing to hide
        inner = scores.softmax(-1)
    else:
        filled = filled[:, None]
        inner = scores.masked_fill(~filled, torch.finfo(wide).min).softmax(-1) * filled
    outputs = (inner.to(value.dtype) @ value).flatten(0, 1)
    back = torch.zeros(present.numel(), dtype=torch.long, device=q.device)
    back = back.scatter(0, pairs[order], slot)
    out, gate = outputs.index_select(0, back), gate.flatten().index_select(0, back)
    out = out * present.flatten()[:, None]
    return out.view(*present.shape, -1), gate.view(present.shape)


def _rows(x: Tensor, flat: Tensor, device: torch.device | None = None) -> Tensor:
    """Return blocks of `x` `(B, Hkv, N, ...)` by their flat index. From another device each block
    that any query needs comes over once."""
    source = x.reshape(-1, *x.shape[3:])
    if device is None or x.device == device:
        return source.index_select(0, flat.flatten()).view(*flat.shape, *x.shape[3:])
    needed, place = flat.unique(return_inverse=True)
    near = moved(source.index_select(0, needed.to(x.device)), device)
    return near.index_select(0, place.flatten()).view(*flat.shape, *x.shape[3:])


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """Bound scores by `softcap tanh(x / softcap)`, if there is a soft cap."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def again_later(function: Callable[..., Any], again: bool, *args: Any) -> Any:
    """Call a function; with `again` what it made in between is computed anew in the backward."""
    if again and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)
