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
    """Compute ELU(x) + 1 in the accumulation dtype: `x + 1` above 0, `exp(x)` below.

    Written without `expm1(x) + 1`, which is 0 below -17 in float32: features stay positive. And
    without a clamp, whose gradient at the bound is 1 or 0 by torch's version: here it is 1.
    """
    x = x.to(accumulation_dtype(x))
    above = F.relu(x)
    return above + (x - above).exp_()


def _lookup(features: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    """Compute `features M / (features z)`, 0 where the denominator is 0: `(..., T, Dv)`.

    An empty memory gives 0 with zero gradients, not 0 times 1/eps.
    """
    both = features @ torch.cat([M, z.unsqueeze(-1)], dim=-1)
    denominator = both[..., -1:]
    inverse = denominator.clamp_min(eps).reciprocal().masked_fill(denominator == 0, 0.0)
    return both[..., :-1] * inverse


def _masked(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Make keys whose features are exactly 0 and values 0 where the mask is false."""
    if mask is None:
        return k, v
    hidden = ~mask[:, None, :, None]
    return k.masked_fill(hidden, float("-inf")), v.masked_fill(hidden, 0.0)


def read_chunked(q: Tensor, M: Tensor, z: Tensor, eps: float) -> Tensor:
    """Compute `infini.read`."""
    grouped = q.unflatten(1, (M.shape[1], -1)).flatten(2, 3)  # (B, Hkv, G * T, Dk)
    return _lookup(phi(grouped).to(M.dtype), M, z, eps).view(*q.shape[:3], M.shape[-1])


def write_chunked(
    k: Tensor, v: Tensor, M: Tensor, z: Tensor, delta: bool, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `infini.write`."""
    k, v = _masked(k, v, mask)
    features, v = phi(k).to(M.dtype), v.to(M.dtype)
    if delta:
        v = v - _lookup(features, M, z, eps)
    return M + features.transpose(-1, -2) @ v, z + features.sum(-2)


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute `infini.scan`."""
    if torch.compiler.is_compiling():  # which fuses what is plain, and knows no scratch
        return _scan_plain(q, k, v, M, z, segment_size, delta, mask, eps)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v, M, z)):
        return _forward(q, k, v, M, z, segment_size, delta, mask, eps, None)
    return _Scan.apply(q, k, v, M, z, segment_size, delta, mask, eps)


def _scan_plain(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the scan as its parts."""
    out = [M.new_empty(*q.shape[:2], 0, M.shape[-1])]
    for start in range(0, q.shape[2], segment_size):
        part = slice(start, start + segment_size)
        part_mask = None if mask is None else mask[:, part]
        out.append(read_chunked(q[:, :, part], M, z, eps))
        M, z = write_chunked(k[:, :, part], v[:, :, part], M, z, delta, part_mask, eps)
    return torch.cat(out, 2), (M if len(out) > 1 else M.clone()), (z if len(out) > 1 else z.clone())


class _Scratch:
    """Tensors that the segments of a scan use one after another: fresh ones would cost the time in
    which their pages are mapped. A result is good until the same name and shape are taken again."""

    def __init__(self, M: Tensor) -> None:
        self.M = M
        self.kept: dict[tuple[Any, ...], Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        place = (name, shape)
        if place not in self.kept:
            self.kept[place] = self.M.new_empty(shape)
        return self.kept[place]

    def phi(self, x: Tensor) -> Tensor:
        """Compute `phi` of `(B, H, T, D)`, the heads of one memory joined: `(B, Hkv, G * T, D)`.
        Powers of two take a third of `exp`'s time where torch leaves that to MKL."""
        x = _grouped(x, self.M.shape[1]).to(self.M.dtype)
        out, above = self.take("features", *x.shape), self.take("above", *x.shape)
        torch.clamp(x, max=0, out=out)
        torch.clamp(x, min=0, out=above)
        return out.mul_(LOG2_E).exp2_().add_(above).flatten(2, 3)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Compute `a @ b` of `(B, Hkv, ...)`."""
        out = self.take(name, *a.shape[:3], b.shape[3])
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
        return out

    def sums(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        """Compute `(a * b).sum(dim)`: torch is slow at products with a single column."""
        return torch.mul(a, b, out=self.take("terms", *a.shape)).sum(dim, keepdim=True)

    def inverse(self, features: Tensor, z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Compute the denominators `(B, Hkv, T, 1)`, and 1 over them (0 for an empty memory)."""
        below = self.sums(features, z.unsqueeze(-2), -1)
        return below, below.clamp_min(eps).reciprocal_().masked_fill_(below == 0, 0.0)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Group heads by memory: `(B, H, T, D)` -> `(B, Hkv, G, T, D)`."""
    return x.unflatten(1, (heads, -1))


def _parts(x: Tensor | None, segment_size: int, count: int, dim: int) -> list[Any]:
    return [None] * count if x is None else list(x.split(segment_size, dim=dim))


def _add_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Compute `a + b^T c` of `(B, Hkv, ...)`."""
    joined = torch.baddbmm(a.flatten(0, 1), b.flatten(0, 1).mT, c.flatten(0, 1))
    return joined.view(a.shape)


def _is_empty(z: Tensor) -> bool:
    """Tell whether nothing was written: then nothing needs to be read."""
    return not bool(z.any())


def _forward(
    q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int, delta: bool,
    mask: Tensor | None, eps: float, states: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the scan without a graph; M and z before each segment go into `states`, if any."""
    heads, work, empty = M.shape[1], _Scratch(M), _is_empty(z)
    out = M.new_empty(*q.shape[:3], v.shape[-1])
    parts = [x.split(segment_size, dim=2) for x in (q, k, v, out)]
    masks = _parts(mask, segment_size, len(parts[0]), 1)
    for own_q, own_k, own_v, own_out, own_mask in zip(*parts, masks, strict=True):
        own_k, own_v = _masked(own_k, own_v, own_mask)
        if states is not None:
            states += [M, z]
        if empty:
            own_out.zero_()
        else:
            features = work.phi(own_q)
            _, inverse = work.inverse(features, z, eps)
            read, place = work.product("values", features, M), _grouped(own_out, heads)
            torch.mul(read.view(place.shape), inverse.view(*place.shape[:4], 1), out=place)
        features, own_v = work.phi(own_k), own_v.to(M.dtype)
        if delta and not empty:
            _, inverse = work.inverse(features, z, eps)
            old_values = work.product("values", features, M)
            changes = work.take("changes", *old_values.shape)
            own_v = torch.addcmul(own_v, old_values, inverse, value=-1, out=changes)
        M, z, empty = _add_product(M, features, own_v), z + features.sum(-2), False
    return out, (M if parts[0] else M.clone()), (z if parts[0] else z.clone())


class _Scan(torch.autograd.Function):
    """The scan with its gradients written out; E and e are those of M and z."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, M: Tensor, z: Tensor, segment_size: int,
        delta: bool, mask: Tensor | None, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        states: list[Tensor] = []
        outputs = _forward(q, k, v, M, z, segment_size, delta, mask, eps, states)
        ctx.save_for_backward(q, k, v, mask, *states)
        ctx.settings = (segment_size, delta, eps)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, E: Tensor, e: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *states = ctx.saved_tensors
        segment_size, delta, eps = ctx.settings
        work = _Scratch(E)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        parts = [x.split(segment_size, dim=2) for x in (q, k, v, d_out, *grads)]
        masks = _parts(mask, segment_size, len(parts[0]), 1)
        for s in reversed(range(len(parts[0]))):
            own_q, own_k, own_v, own_d, dq, dk, dv = (x[s] for x in parts)
            own_k, own_v = _masked(own_k, own_v, masks[s])
            M, z = states[2 * s : 2 * s + 2]
            empty = s == 0 and _is_empty(z)
            E, e = _write_backward(work, own_k, own_v, M, z, E, e, delta and not empty, eps, dk, dv)
            if empty:
                dq.zero_()
            else:
                E, e = _read_backward(work, own_q, own_d, M, z, E, e, eps, dq)
        return (*grads, E, e, None, None, None, None)


def _write_backward(
    work: _Scratch, k: Tensor, v: Tensor, M: Tensor, z: Tensor, E: Tensor, e: Tensor, delta: bool,
    eps: float, dk: Tensor, dv: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of one segment's keys and values (into dk and dv), and of the memory
    before it."""
    features, v = work.phi(k), v.to(M.dtype)
    change = work.product("change", features, E)
    dv.copy_(change)
    if not delta:
        d_features = work.product("d_features", v, E.mT).add_(e.unsqueeze(-2))
        torch.mul(d_features, features.clamp_max_(1), out=dk)
        return E, e
    below, inverse = work.inverse(features, z, eps)
    old_values = work.product("values", features, M).mul_(inverse)
    share = work.sums(change, old_values, -1).mul_(inverse).mul_(below >= eps)
    d_old_values = change.mul_(inverse.neg_())
    d_features = work.product("d_features", torch.sub(v, old_values, out=old_values), E.mT)
    d_features += work.product("values", d_old_values, M.mT)
    d_features.add_(e.unsqueeze(-2)).addcmul_(share, z.unsqueeze(-2))
    E, e = _add_product(E, features, d_old_values), e + work.sums(features, share, -2).squeeze(-2)
    torch.mul(d_features, features.clamp_max_(1), out=dk)
    return E, e


def _read_backward(
    work: _Scratch, q: Tensor, d_out: Tensor, M: Tensor, z: Tensor, E: Tensor, e: Tensor,
    eps: float, dq: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of one segment's queries (into dq), and of the memory that they read,
    added to E and e."""
    heads = M.shape[1]
    features, d_out = work.phi(q), _grouped(d_out, heads)
    below, inverse = work.inverse(features, z, eps)
    d_read = work.take("d_read", *d_out.shape)
    torch.mul(d_out, inverse.view(*d_out.shape[:4], 1), out=d_read)
    d_read = d_read.flatten(2, 3)
    d_features = work.product("d_features", d_read, M.mT)
    share = work.sums(features, d_features, -1).mul_(inverse).mul_(below >= eps).neg_()
    E, e = _add_product(E, features, d_read), e + work.sums(features, share, -2).squeeze(-2)
    d_features.addcmul_(share, z.unsqueeze(-2))
    place = _grouped(dq, heads)
    torch.mul(d_features.view(place.shape), features.clamp_max_(1).view(place.shape), out=place)
    return E, e
