"""Landmark attention: the grouped softmax, and the choice and reading of stored blocks.

Mohtashami and Jaggi, "Landmark Attention" (2023), sections 3.1 and 3.2. A block is m tokens and
one landmark behind them. A query weighs the tokens of its own block and the landmarks of earlier
blocks in one softmax; what a landmark gets is shared out among its block's tokens by a softmax over
these. The values of landmarks are never read.

Shapes: B batch, H query heads, Hkv KV heads (query head h belongs to KV head `h // (H / Hkv)`,
which is never repeated), T queries, K keys, N blocks, m tokens of a block, R blocks that a query
reads. Scores and sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memwrap.ops import accumulation_dtype, current_backend
from memwrap.ops.fetching import moved
from memwrap.ops.landmark_naive import attention_naive, grouped_softmax, retrieved_naive

__all__ = [
    "attention", "block_scores", "choose", "grouped_softmax", "merge", "queries_for", "read_slots",
    "retrieved", "shares",
]  # fmt: skip

# At most so many scores, or numbers of gathered keys, exist at once.
AT_ONCE = 2**26
# Above so many they are computed again in the backward pass, and not kept until then.
SAVED = 2**22


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
    """Causal attention with the grouped softmax over blocks that lie one behind the other.

    With section `s(j) = j // (m + 1)` of the key at place j, c that of the query, S the tokens of
    section c that the query sees, l_s the landmark and N_s the tokens of section s < c:

        Z = sum_S exp(x_j) + sum_{s < c} exp(x_{l_s})
        p_j = exp(x_j) / Z on S,  exp(x_{l_s}) / Z * softmax(x over N_s)_j on N_s,  0 on landmarks

    Args:
        q: `(B, H, T, Dk)`, rotated.
        k, v: `(B, Hkv, K, Dk)` and `(B, Hkv, K, Dv)`, the key at place j in row j; landmarks are
            the rows j with `j % (m + 1) == m`. K need not fill a block.
        block_size: m, tokens of a block without its landmark.
        scaling: of the scores (default `Dk ** -0.5`).
        places: `(B, T)` of the queries; default: the last T of K.
        landmark: `(B, T)` bool, queries that are landmarks: they do not see their own key. Default:
            by place. One that closes a partial block has to be said.
        valid: `(B, K)` bool; False is padding. An earlier block of nothing but padding has no
            share, whatever its landmark is.
        documents: `(B, N)`, the document of each block: a query sees blocks of its own one.
        softcap: scores x become `softcap tanh(x / softcap)`.
        window: a query sees so many of its own block's last tokens.

    Returns:
        The output `(B, H, T, Dv)` in v's dtype and the log of Z `(B, H, T)`; a query that sees
        nothing gives 0, and its log is the smallest number.

    Raises:
        ValueError: for shapes that do not fit.
    """
    _check(q, k, v, block_size, places)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    chosen = current_backend(q, _attention_unsupported(q, k, v, softcap, window))
    if chosen == "triton":
        from memwrap_kernels import landmark as kernels

        return kernels.attention(
            q, k, v, block_size, scaling=scaling, places=places, landmark=landmark, valid=valid,
            documents=documents,
        )  # fmt: skip
    first = None
    if places is None:
        first = k.shape[2] - q.shape[2]
        places = torch.arange(first, k.shape[2], device=q.device).expand(q.shape[0], -1)
    if landmark is None:
        landmark = places % (block_size + 1) == block_size
    if chosen == "naive":
        return attention_naive(
            q, k, v, block_size, scaling, places, landmark, valid, documents, softcap, window
        )
    each = q.shape[0] * q.shape[1] * k.shape[2]
    step = max(1, AT_ONCE // max(1, each))
    # A query's keys end with its own place: pieces leave out what none of their queries sees.
    step = min(step, 16 * (block_size + 1)) if first is not None else step
    again, parts = each * q.shape[2] > SAVED, []
    for start in range(0, q.shape[2], step):
        piece = slice(start, start + step)
        stop = k.shape[2] if first is None else min(k.shape[2], first + start + step)
        args = (
            q[:, :, piece], k[:, :, :stop], v[:, :, :stop], block_size, scaling, places[:, piece],
            landmark[:, piece], None if valid is None else valid[:, :stop], documents, softcap,
            window,
        )  # fmt: skip
        parts.append(again_later(_attention, again, *args))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 2), torch.cat([log for _, log in parts], 2)


def _attention_unsupported(
    q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None
) -> str:
    if current_backend(q) != "triton":
        return ""
    from memwrap_kernels import landmark as kernels

    return kernels.unsupported(q, k, v, softcap, window)


def _retrieved_unsupported(q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor) -> str:
    if current_backend(q) != "triton":
        return ""
    from memwrap_kernels import landmark as kernels

    given = (q, keys, values, landmarks)
    if any(x.device != q.device for x in given):
        return "blocks on another device"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "gradients of chosen blocks"
    return kernels.unsupported(q, keys, values)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, m: int, scaling: float, places: Tensor, landmark: Tensor,
    valid: Tensor | None, documents: Tensor | None, softcap: float | None, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax over `x_j + b_s`: with `b_s = x_{l_s} - logsumexp(x over N_s)` for an earlier
    section and 0 for the own one, the weights are those of the grouped softmax."""
    batch, heads, length, _ = q.shape
    total, groups = k.shape[2], heads // k.shape[1]
    short = -total % (m + 1)
    count = (total + short) // (m + 1)
    if valid is None:
        valid = torch.ones(batch, total, dtype=torch.bool, device=q.device)
    if short:
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, short)) for t in (k, v))
        valid = torch.nn.functional.pad(valid, (0, short))
    there = valid.view(batch, 1, 1, 1, count, m + 1)
    x = q.unflatten(1, (-1, groups)).flatten(2, 3) @ k.transpose(-1, -2)
    x = _capped(x.to(accumulation_dtype(q)) * scaling, softcap)
    x = x.view(batch, -1, groups, length, count, m + 1)
    tokens, gate, here = x[..., :m], x[..., m], there[..., :m]
    section, inside = (p[:, None, None, :, None] for p in (places // (m + 1), places % (m + 1)))
    index = torch.arange(count, device=q.device)
    earlier = (index < section) & there[..., m] & here.any(-1)
    own = index == section
    if documents is not None:
        mine = documents.gather(1, (places // (m + 1)).clamp_max(documents.shape[1] - 1))
        same = documents[:, None, :count] == mine[..., None]
        earlier = earlier & same[:, None, None]
    last = (inside - landmark[:, None, None, :, None].long())[..., None]
    row = torch.arange(m, device=q.device)
    seen = own[..., None] & (row <= last)
    if window is not None:
        seen = seen & (row > inside[..., None] - window)
    least = torch.finfo(x.dtype).min
    bias = gate - tokens.masked_fill(~here, least).logsumexp(-1)
    bias = torch.where(earlier, bias, torch.zeros((), dtype=bias.dtype, device=bias.device))
    visible = ((earlier[..., None] | seen) & here).expand(*x.shape[:-1], m)
    y = (tokens + bias[..., None]).masked_fill(~visible, least).flatten(-2)
    log = y.logsumexp(-1)
    p = (y - log[..., None]).exp() * visible.flatten(-2)
    values = v.unflatten(2, (count, m + 1))[..., :m, :].flatten(2, 3)
    out = p.to(v.dtype).flatten(2, 3) @ values
    return out.view(batch, heads, length, -1), log.view(batch, heads, length)


def queries_for(block_size: int, top_k: int, places: Tensor) -> Tensor:
    """Positions `(B, T, R + 1)` at which a query at `places` `(B, T)` sees the block that stands
    u = 1 .. R + 1 blocks in front of the segment, where a block's rows have positions 0 .. m:
    R + 1 slots of m + 1 positions lie directly before the segment (section 3.2)."""
    back = torch.arange(1, top_k + 2, device=places.device)
    return places[..., None] + back * (block_size + 1)


def block_scores(
    q: Tensor,
    landmarks: Tensor,
    count: Tensor,
    scaling: float,
    softcap: float | None = None,
    *,
    tied: bool = False,
) -> Tensor:
    """Scores of the stored blocks by their landmarks.

    The last R blocks are seen where they stand, all older ones in the one slot before these.

    Args:
        q: `(B, H, T, R + 1, Dk)`, rotated to the positions of `queries_for`.
        landmarks: `(B, Hkv, N, Dk)`, rotated to their place in the block.
        count: `(B,)` blocks that are there, oldest first, from the left.
        tied: blocks whose landmarks differ from the last one's by no more than rounding tie
            exactly. So they do in the first layer, where a landmark knows nothing of its block.

    Returns:
        `(B, H, T, N)`, -inf where there is no block.
    """
    slots, size = q.shape[3] - 1, landmarks.shape[2]
    q = q.unflatten(1, (landmarks.shape[1], -1))
    x = torch.einsum("bhgtd,bhnd->bhgtn", q[..., slots, :], landmarks)
    if tied:
        index = (count - 1).clamp_min(0).view(-1, 1, 1, 1).expand_as(landmarks[:, :, :1])
        last = landmarks.gather(2, index)
        most = max(1e-3, 8 * torch.finfo(landmarks.dtype).eps) * last.abs().amax(-1)
        same = (landmarks - last).abs().amax(-1) <= most
        one = torch.einsum("bhgtd,bhd->bhgt", q[..., slots, :], last.squeeze(2))
        x = torch.where(same[:, :, None, None], one[..., None], x)
    places = count[:, None] - torch.arange(1, slots + 1, device=count.device)
    index = places.clamp(0, size - 1)[:, None, :, None]
    recent = landmarks.gather(2, index.expand(-1, landmarks.shape[1], -1, landmarks.shape[3]))
    near = torch.einsum("bhgtrd,bhrd->bhgtr", q[..., :slots, :], recent)
    x = torch.cat([x, x[..., :1]], -1)  # a column for what is not there
    index = torch.where(places >= 0, places, size)[:, None, None, None].expand(near.shape)
    x = x.scatter(-1, index, near)[..., :size].flatten(1, 2)
    x = _capped(x.to(accumulation_dtype(q)) * scaling, softcap)
    there = torch.arange(size, device=count.device) < count[:, None]
    return x.masked_fill(~there[:, None, None], -torch.inf)


def shares(scores: Tensor) -> Tensor:
    """What each block gets of a query by the scores `(..., N)` alone; 0 where there is none."""
    there = scores > -torch.inf
    return scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-1) * there


def choose(scores: Tensor, top_k: int) -> Tensor:
    """The blocks with the largest scores `(..., N)`, `(..., R)` ascending; N where fewer are there.
    Of equal scores the most recent blocks are taken."""
    size = scores.shape[-1]
    top_k = min(top_k, size)
    least = scores.topk(top_k, -1).values[..., -1:]
    more, equal = scores > least, scores == least
    wanted = top_k - more.sum(-1, keepdim=True)
    rank = equal.flip(-1).cumsum(-1).flip(-1)
    chosen = (more | (equal & (rank <= wanted))) & (scores > -torch.inf)
    index = torch.where(chosen, torch.arange(size, device=scores.device), size)
    return index.topk(top_k, -1, largest=False, sorted=True).values


def read_slots(ids: Tensor, count: Tensor, top_k: int) -> Tensor:
    """How many blocks back each chosen block is read, `(B, H, T, R)`, for `choose`'s result.

    The r-th of R = min(top_k, count) blocks stands at slot r of the R + 1 before the segment, and
    at slot r + 1 if it is one of the last R.
    """
    count = count.view(-1, 1, 1, 1)
    slots = count.clamp_max(top_k)
    rank = torch.arange(ids.shape[-1], device=ids.device)
    return (slots + 1 - rank - (ids >= count - slots).long()).clamp(1, top_k + 1)


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
    """Read chosen blocks: one softmax over their landmarks, within each one over its tokens.

    Args:
        q: `(B, H, T, R, Dk)`, the query as each of its blocks sees it.
        keys, values: `(B, Hkv, N, m, Dk)` and `(B, Hkv, N, m, Dv)`, on any device.
        landmarks: `(B, Hkv, N, Dk)`.
        valid: `(B, N, m)` bool; a block without a token is as one that is not there.
        ids: `(B, H, T, R)`, or `(B, H, 1, R)` for all queries; N for none.

    Returns:
        The output `(B, H, T, Dv)` and the log of the landmarks' sum `(B, H, T)`, for `merge`.
    """
    chosen = current_backend(q, _retrieved_unsupported(q, keys, values, landmarks))
    if chosen == "triton":
        from memwrap_kernels import landmark as kernels

        return kernels.retrieved(q, keys, values, landmarks, valid, ids, scaling, softcap)
    if chosen == "naive":
        return retrieved_naive(q, keys, values, landmarks, valid, ids, scaling, softcap)
    batch, heads, size = ids.shape[0], ids.shape[1], landmarks.shape[2]
    # A block without a token has no share, as one that is not there.
    some = torch.nn.functional.pad(valid.any(-1), (0, 1))[:, None, None]
    there = some.expand(*ids.shape[:3], -1).gather(-1, ids.clamp_max(size))
    kv = torch.arange(heads, device=ids.device) // (heads // landmarks.shape[1])
    row = torch.arange(batch, device=ids.device)[:, None] * landmarks.shape[1] + kv
    flat = row[..., None, None] * size + ids.clamp_max(size - 1)
    valid = valid[:, None].expand(-1, landmarks.shape[1], -1, -1)
    if ids.shape[2] == 1:
        found, gate = _read_gathered(q, keys, values, landmarks, valid, flat, scaling, softcap)
    else:
        found, gate = _read_grouped(
            q, keys, values, landmarks, valid, flat, there, scaling, softcap
        )
    gate = gate.masked_fill(~there, torch.finfo(gate.dtype).min)
    log = gate.logsumexp(-1)
    outer = (gate - log[..., None]).exp() * there
    return (outer.to(found.dtype)[..., None] * found).sum(-2), log


def _read_gathered(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, flat: Tensor,
    scaling: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `q` `(B, H, T, R, Dk)` finds in each of its blocks, `(B, H, T, R, Dv)`, and the scores
    of their landmarks `(B, H, T, R)`; the blocks `flat` `(B, H, 1, R)` are those of all queries."""
    key, value, mark, here = (_rows(x, flat, q.device) for x in (keys, values, landmarks, valid))
    gate = torch.einsum("bhtrd,bhrd->bhtr", q, mark.squeeze(2))
    x = torch.einsum("bhtrd,bhrmd->bhtrm", q, key.squeeze(2))
    wide = accumulation_dtype(q)
    gate, x = (_capped(t.to(wide) * scaling, softcap) for t in (gate, x))
    inner = x.masked_fill(~here, torch.finfo(wide).min).softmax(-1) * here
    return torch.einsum("bhtrm,bhrmd->bhtrd", inner.to(value.dtype), value.squeeze(2)), gate


def _read_grouped(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, flat: Tensor,
    there: Tensor, scaling: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where each query has blocks of its own, `flat` and `there` `(B, H, T, R)`.

    The pairs of a query and a block are sorted by block, so that a block's keys are fetched for all
    that read it: queries move, which are m times smaller. Pairs stand in rows of one length, near
    the mean number of readers; a block with more readers has several rows.
    """
    pairs = there.flatten().nonzero().squeeze(1)
    if not len(pairs):  # a zero that still belongs to the graph
        nothing = q.sum(-1) * 0
        return nothing[..., None].expand(*q.shape[:4], values.shape[-1]).to(values.dtype), nothing
    blocks, which, readers = flat.flatten()[pairs].unique(return_inverse=True, return_counts=True)
    width = -(-len(pairs) // len(blocks))
    rows = (readers + width - 1) // width  # of each block
    order = which.argsort(stable=True)
    first = readers.cumsum(0) - readers
    rank = torch.arange(len(pairs), device=q.device) - first[which[order]]
    start = (rows.cumsum(0) - rows)[which[order]] * width
    slot = start + rank
    # Places of the rows without a pair repeat the first one: what they find is not read.
    total = int(rows.sum()) * width
    source = torch.zeros(total, dtype=torch.long, device=q.device).scatter(0, slot, pairs[order])
    x = q.flatten(0, 3).index_select(0, source).view(-1, width, q.shape[-1])
    mine = blocks.repeat_interleave(rows)
    key, value, mark, here = (_rows(t, mine, q.device) for t in (keys, values, landmarks, valid))
    wide = accumulation_dtype(q)
    gate = (x @ mark[..., None]).squeeze(-1)
    scores = x @ key.transpose(-1, -2)
    gate, scores = (_capped(t.to(wide) * scaling, softcap) for t in (gate, scores))
    here = here[:, None]
    inner = scores.masked_fill(~here, torch.finfo(wide).min).softmax(-1) * here
    found = (inner.to(value.dtype) @ value).flatten(0, 1)
    back = torch.zeros(there.numel(), dtype=torch.long, device=q.device)
    back = back.scatter(0, pairs[order], slot)
    out, gate = found.index_select(0, back), gate.flatten().index_select(0, back)
    out = out * there.flatten()[:, None]
    return out.view(*there.shape, -1), gate.view(there.shape)


def _rows(x: Tensor, flat: Tensor, device: torch.device | None = None) -> Tensor:
    """Blocks of `x` `(B, Hkv, N, ...)` by their flat index. From another device each block that
    any query needs comes over once."""
    source = x.reshape(-1, *x.shape[3:])
    if device is None or x.device == device:
        return source.index_select(0, flat.flatten()).view(*flat.shape, *x.shape[3:])
    needed, place = flat.unique(return_inverse=True)
    near = moved(source.index_select(0, needed.to(x.device)), device)
    return near.index_select(0, place.flatten()).view(*flat.shape, *x.shape[3:])


def merge(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """One attention `(B, H, T, Dv)` of several over different keys, each with its sum's log."""
    logs = torch.stack([log for _, log in parts])
    weights = (logs - logs.logsumexp(0)).exp()[..., None]
    dtype = parts[0][0].dtype
    return sum((w * out for w, (out, _) in zip(weights, parts, strict=True))).to(dtype)


def _capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def again_later(function: Callable[..., Any], again: bool, *args: Any) -> Any:
    """Call a function; with `again` what it made in between is computed anew in the backward."""
    if again and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int, places: Tensor | None) -> None:
    if block_size < 1:
        raise ValueError(f"`block_size` is {block_size}; it must be at least 1.")
    if q.dim() != 4 or k.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"Queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)} do not fit: "
            "they are (B, H, T, Dk), (B, Hkv, K, Dk), (B, Hkv, K, Dv) with H a multiple of Hkv."
        )
    if places is None and k.shape[2] < q.shape[2]:
        raise ValueError(f"{q.shape[2]} queries stand behind {k.shape[2]} keys; give `places`.")
