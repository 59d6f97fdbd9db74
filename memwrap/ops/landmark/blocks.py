"""Stored blocks of landmark attention: their scores, which are chosen, and where they are read
(Mohtashami and Jaggi 2023, section 3.2). Shapes as in `memwrap.ops.landmark`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype
from memwrap.ops.buffers.host_prefetch import moved
from memwrap.ops.landmark.chunked import capped


def queries_for(block_size: int, top_k: int, places: Tensor) -> Tensor:
    """Return positions `(B, T, R + 1)` at which a query at `places` `(B, T)` sees the block that
    stands u = 1 .. R + 1 blocks in front of the segment, where a block's rows have positions 0 ..
    m: R + 1 slots of m + 1 positions lie directly before the segment (section 3.2)."""
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
    """Score the stored blocks by their landmarks.

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
    far = q[..., slots, :].unflatten(1, (landmarks.shape[1], -1))
    x = (far.flatten(2, 3) @ landmarks.mT).unflatten(2, far.shape[2:4])
    if tied:
        index = (count - 1).clamp_min(0).view(-1, 1, 1, 1).expand_as(landmarks[:, :, :1])
        last = landmarks.gather(2, index)
        most = max(1e-3, 8 * torch.finfo(landmarks.dtype).eps) * last.abs().amax(-1)
        same = (landmarks - last).abs().amax(-1) <= most
        one = far @ last[..., None, 0, :, None]
        x = torch.where(same[:, :, None, None], one, x)
    places = count[:, None] - torch.arange(1, slots + 1, device=count.device)
    index = places.clamp(0, size - 1)[:, None, :, None]
    recent = landmarks.gather(2, index.expand(-1, landmarks.shape[1], -1, landmarks.shape[3]))
    near = q[..., :slots, :].unflatten(1, (landmarks.shape[1], -1)) * recent[:, :, None, None]
    near = near.sum(-1)
    x = torch.cat([x, x[..., :1]], -1)  # a column for what is not there
    index = torch.where(places >= 0, places, size)[:, None, None, None].expand(near.shape)
    x = x.scatter(-1, index, near.to(x.dtype))[..., :size].flatten(1, 2)
    x = capped(x.to(accumulation_dtype(q)) * scaling, softcap)
    present = torch.arange(size, device=count.device) < count[:, None]
    return x.masked_fill(~present[:, None, None], -torch.inf)


def shares(scores: Tensor) -> Tensor:
    """Share a query among blocks by the scores `(..., N)` alone; 0 where there is none."""
    present = scores > -torch.inf
    return scores.masked_fill(~present, torch.finfo(scores.dtype).min).softmax(-1) * present


def choose(scores: Tensor, top_k: int) -> Tensor:
    """Return the blocks with the largest scores `(..., N)`, `(..., R)` ascending; N where fewer are
    there. Of equal scores the most recent blocks are taken."""
    size = scores.shape[-1]
    top_k = min(top_k, size)
    best = scores.topk(top_k, -1)
    least = best.values[..., -1:]
    # A look costs little on a CPU, and mostly no score is there twice.
    if scores.device.type == "cpu" and bool(((scores >= least).sum(-1) == top_k).all()):
        return best.indices.masked_fill(best.values == -torch.inf, size).sort(-1).values
    more, equal = scores > least, scores == least
    wanted = top_k - more.sum(-1, keepdim=True)
    rank = equal.flip(-1).cumsum(-1).flip(-1)
    chosen = (more | (equal & (rank <= wanted))) & (scores > -torch.inf)
    index = torch.where(chosen, torch.arange(size, device=scores.device), size)
    return index.topk(top_k, -1, largest=False, sorted=True).values


def read_slots(ids: Tensor, count: Tensor, top_k: int) -> Tensor:
    """Tell how many blocks back each chosen block is read, `(B, H, T, R)`, for `choose`'s result.

    The r-th of R = min(top_k, count) blocks stands at slot r of the R + 1 before the segment, and
    at slot r + 1 if it is one of the last R.
    """
    count = count.view(-1, 1, 1, 1)
    slots = count.clamp_max(top_k)
    rank = torch.arange(ids.shape[-1], device=ids.device)
    return (slots + 1 - rank - (ids >= count - slots).long()).clamp(1, top_k + 1)


def merge(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Merge attentions `(B, H, T, Dv)` over different keys, each with its sum's log, to one."""
    logs = torch.stack([log for _, log in parts])
    weights = (logs - logs.logsumexp(0)).exp()[..., None]
    dtype = parts[0][0].dtype
    return sum((w * out for w, (out, _) in zip(weights, parts, strict=True))).to(dtype)


def used_blocks(ids: Tensor, valid: Tensor, landmarks: Tensor, *far: Tensor) -> tuple[Tensor, ...]:
    """Make a small store that holds the blocks that some queries of one KV head chose.

    Args:
        ids: `(B, G, T, R)` the blocks; N for none.
        valid, landmarks: `(B, N, m)` and `(B, N, D)`, on the device of `ids`.
        far: `(B, N, ...)`, on any device; what is needed of them comes over once.

    Returns:
        `ids`, `valid`, `landmarks` and `far` with n blocks instead of N, as many as the row needs
        that needs most.
    """
    batch, size = landmarks.shape[:2]
    used = torch.zeros(batch, size + 1, dtype=torch.bool, device=ids.device)
    used = used.scatter(1, ids.flatten(1), True)[:, :size]
    count = max(1, int(used.sum(1).max()))
    rank = torch.nn.functional.pad(used.long().cumsum(1) - 1, (0, 1), value=count)
    new = rank[:, None, None].expand(*ids.shape[:3], -1).gather(-1, ids)
    rows = (~used).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    take = partial(_taken, rows)
    return new, take(valid), take(landmarks), *[moved(take(x), ids.device) for x in far]


def _taken(rows: Tensor, x: Tensor) -> Tensor:
    return x[torch.arange(len(rows), device=x.device)[:, None], rows.to(x.device)]
