"""The compressive memory in fast torch: whole segments at once; formulas in `memwrap.ops.infini`.

A scan keeps nothing for its backward but its inputs and the state before each segment, and makes
the features again: autograd's own graph would hold several float32 copies of every token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from memwrap.ops import accumulation_dtype

LOG2_E = math.log2(math.e)


def phi(x: Tensor) -> Tensor:
    """ELU(x) + 1 in the accumulation dtype: `x + 1` above 0, `exp(x)` below.

    Written without `expm1(x) + 1`, which is 0 below -17 in float32: features stay positive.
    """
    x = x.to(accumulation_dtype(x))
    return F.relu(x) + x.clamp_max(0).exp_()


def _lookup(features: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    """`features M / (features z)`, 0 where the denominator is 0: `(..., T, Dv)`.

    An empty memory gives 0 with zero gradients, not 0 times 1/eps.
    """
    both = features @ torch.cat([M, z.unsqueeze(-1)], dim=-1)
    denominator = both[..., -1:]
    inverse = denominator.clamp_min(eps).reciprocal().masked_fill(denominator == 0, 0.0)
    return both[..., :-1] * inverse


def _masked(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys whose features are exactly 0 and values 0 where the mask is false."""
    if mask is None:
        return k, v
    hidden = ~mask[:, None, :, None]
    return k.masked_fill(hidden, float("-inf")), v.masked_fill(hidden, 0.0)


def read_chunked(q: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    """`infini.read`."""
    grouped = q.unflatten(1, (M.shape[1], -1)).flatten(2, 3)  # (B, Hkv, G * T, Dk)
    return _lookup(phi(grouped).to(M.dtype), M, z, eps).view(*q.shape[:3], M.shape[-1])


def write_chunked(
    k: Tensor, v: Tensor, M: Tensor, z: Tensor, delta: bool, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`infini.write`."""
    k, v = _masked(k, v, mask)
    features, v = phi(k).to(M.dtype), v.to(M.dtype)
    if delta:
        v = v - _lookup(features, M, z, eps)
    return M + features.transpose(-1, -2) @ v, z + features.sum(-2)


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`infini.scan`."""
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v, M, z)):
        return _forward(q, k, v, M, z, segment_size, delta, mask, eps, None)
    return _Scan.apply(q, k, v, M, z, segment_size, delta, mask, eps)


def _fast_phi(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`phi` where no gradient is asked for, in fewer passes; powers of two take a third of `exp`'s
    time where torch leaves that to MKL."""
    x = x.to(dtype)
    return x.clamp_max(0).mul_(LOG2_E).exp2_().add_(F.relu(x))


def _grouped(x: Tensor, heads: int) -> Tensor:
    """`(B, H, T, D)` -> `(B, Hkv, G, T, D)`."""
    return x.unflatten(1, (heads, -1))


def _parts(x: Tensor | None, segment_size: int, count: int, dim: int) -> list[Any]:
    return [None] * count if x is None else list(x.split(segment_size, dim=dim))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float, states: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The scan without a graph; M and z before each segment, joined, go into `states`, if any."""
    heads = M.shape[1]
    out = M.new_empty(*q.shape[:3], v.shape[-1])
    parts = [x.split(segment_size, dim=2) for x in (q, k, v, out)]
    masks = _parts(mask, segment_size, len(parts[0]), 1)
    for own_q, own_k, own_v, own_out, own_mask in zip(*parts, masks, strict=True):
        own_k, own_v = _masked(own_k, own_v, own_mask)
        both = torch.cat([M, z.unsqueeze(-1)], dim=-1)
        if states is not None:
            states.append(both)
        # Features first: they are dense, so that joining heads and tokens copies nothing.
        features = _fast_phi(_grouped(own_q, heads), M.dtype).flatten(2, 3)
        found, inverse, _ = _divide(features @ both, eps)
        shape = _grouped(own_out, heads)
        torch.mul(found.view(shape.shape), inverse.view(*shape.shape[:4], 1), out=shape)
        features, own_v = _fast_phi(own_k, M.dtype), own_v.to(M.dtype)
        if delta:
            found, inverse, _ = _divide(features @ both, eps)
            own_v = own_v - found * inverse
        M, z = M + features.transpose(-1, -2) @ own_v, z + features.sum(-2)
    return out, (M if parts[0] else M.clone()), (z if parts[0] else z.clone())


def _divide(both: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Numerators, 1 / denominator (0 for an empty memory), where its gradient is not clamped."""
    denominator = both[..., -1:]
    inverse = denominator.clamp_min(eps).reciprocal_().masked_fill_(denominator == 0, 0.0)
    return both[..., :-1], inverse, denominator >= eps


class _Scan(torch.autograd.Function):
    """The scan with its gradients written out; E and e are those of M and z."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int,
        delta: bool, mask: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        states: list[Tensor] = []
        found = _forward(q, k, v, M, z, segment_size, delta, mask, eps, states)
        ctx.save_for_backward(q, k, v, mask, *states)
        ctx.settings = (segment_size, delta, eps)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, E: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *states = ctx.saved_tensors
        segment_size, delta, eps = ctx.settings
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        parts = [x.split(segment_size, dim=2) for x in (q, k, v, d_out, *grads)]
        masks = _parts(mask, segment_size, len(states), 1)
        for s in reversed(range(len(states))):
            own_q, own_k, own_v, own_d, dq, dk, dv = (x[s] for x in parts)
            own_k, own_v = _masked(own_k, own_v, masks[s])
            before = _write_backward(own_k, own_v, states[s], E, e, delta, eps, dk, dv)
            read = _read_backward(own_q, own_d, states[s], eps, dq)
            E, e = (a + b for a, b in zip(before, read, strict=True))
        return (*grads, E, e, None, None, None, None)


def _write_backward(
    k: Tensor, v: Tensor, both: Tensor, E: Tensor, e: Tensor, delta: bool, eps: float,
    dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of one segment's keys and values (into dk and dv), and of the memory before it."""
    features, v = _fast_phi(k, both.dtype), v.to(both.dtype)
    change = features @ E
    dv.copy_(change)
    if not delta:
        d_features = (v @ E.transpose(-1, -2)).add_(e.unsqueeze(-2))
        torch.mul(d_features, features.clamp_max_(1), out=dk)
        return E, e
    found, inverse, free = _divide(features @ both, eps)
    found = found * inverse
    share = (change * found).sum(-1, keepdim=True).mul_(inverse).mul_(free)
    d_both = torch.cat([change.mul_(-inverse), share], dim=-1)
    d_features = ((v - found) @ E.transpose(-1, -2)).add_(e.unsqueeze(-2))
    d_features += d_both @ both.transpose(-1, -2)
    own = features.transpose(-1, -2) @ d_both
    torch.mul(d_features, features.clamp_max_(1), out=dk)
    return E + own[..., :-1], e + own[..., -1]


def _read_backward(
    q: Tensor, d_out: Tensor, both: Tensor, eps: float, dq: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one segment's queries (into dq), and of the memory that they read."""
    heads = both.shape[1]
    shape = _grouped(q, heads).shape
    features = _fast_phi(_grouped(q, heads), both.dtype).flatten(2, 3)
    _, inverse, free = _divide(features @ both[..., -1:], eps)
    d_found = (_grouped(d_out, heads) * inverse.view(*shape[:4], 1)).flatten(2, 3)
    d_features = d_found @ both[..., :-1].transpose(-1, -2)
    share = (features * d_features).sum(-1, keepdim=True).mul_(inverse).mul_(free).neg_()
    own_M, own_z = features.transpose(-1, -2) @ d_found, features.transpose(-1, -2) @ share
    d_features += share * both[..., -1].unsqueeze(-2)
    slope = features.clamp_max_(1).view(shape)
    torch.mul(d_features.view(shape), slope, out=_grouped(dq, heads))
    return own_M, own_z.squeeze(-1)
