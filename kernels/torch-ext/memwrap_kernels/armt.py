"""The associative memory (ARMT) as two differentiable operators on raw projections.

Shapes: q, k `(B, H, T, D)`; A `(B, H, K, V)` and z `(B, H, K)` in float32 with `K = 2 nu D`;
v `(B, H, T, V)`; beta `(B, H, T, 1)` or `(B, H, T, V)`; written `(B,)` bool.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import armt_kernels as kernels
from .launch import is_hip, on_device_of, rows
from .namespace import add_op_namespace_prefix
from .tiles import armt_tiles, padded, precision

__all__ = ["read", "write"]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def _read(
    x: Tensor, A: Tensor, z: Tensor | None, nu: int, normalize: bool, eps: float, stats: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read what the memory holds for each token, and by token r, the denominator and |phi|^2."""
    batch, heads, tokens, width = x.shape
    values = A.shape[-1]
    out = _empty(x, batch, heads, tokens, values)
    one, two, three = (_empty(x, batch, heads, tokens if stats else 0) for _ in range(3))
    x, A = rows(x), A.contiguous()
    tiles = armt_tiles("read", values, x.dtype, is_hip())
    grid = (triton.cdiv(tokens, tiles.tokens) * triton.cdiv(values, tiles.values), batch * heads)
    with on_device_of(x):
        kernels.read_kernel[grid](
            x, A, A if z is None else z.contiguous(), out, one, two, three,
            *x.stride()[:3], tokens, heads,
            eps, D=width, NU=nu, DV=values, BT=tiles.tokens, BF=tiles.keys, BV=tiles.values,
            HAS_Z=z is not None, NORMALIZE=normalize, STATS=stats,
            PRECISION=precision(x.dtype, is_hip()), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, one, two, three


def _project(y: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `y A^T`: `(B, H, T, K)`."""
    batch, heads, tokens, values = y.shape
    keys = A.shape[2]
    out = _empty(y, batch, heads, tokens, keys)
    y, A = rows(y), A.contiguous()
    tiles = armt_tiles("project", values, dtype, is_hip())
    grid = (triton.cdiv(tokens, tiles.tokens) * triton.cdiv(keys, tiles.keys), batch * heads)
    with on_device_of(y):
        kernels.project_kernel[grid](
            y, A, out, *y.stride()[:3], tokens, heads, K=keys, DV=values, BT=tiles.tokens,
            BF=tiles.keys, BV=tiles.values, PRECISION=precision(dtype, is_hip()),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out


def _write(
    x: Tensor, y: Tensor, weights: Tensor, weights_z: Tensor | None, nu: int,
    A: Tensor | None = None, z: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute `[A +] sum_t f_t^T w_t y_t` and, with `weights_z`, `[z +] sum_t w'_t f_t`."""
    batch, heads, tokens, width = x.shape
    values, keys = y.shape[-1], 2 * nu * width
    out = _empty(x, batch, heads, keys, values)
    out_z = None if weights_z is None else _empty(x, batch, heads, keys)
    x, y = rows(x), rows(y)
    tiles = armt_tiles("write", values, x.dtype, is_hip())
    with on_device_of(x):
        kernels.write_kernel[
            (triton.cdiv(keys, tiles.keys) * triton.cdiv(values, tiles.values), batch * heads)
        ](
            x, y, weights.contiguous(), weights if weights_z is None else weights_z.contiguous(),
            out if A is None else A.contiguous(), out if z is None else z.contiguous(),
            out, out if out_z is None else out_z,
            *x.stride()[:3], *y.stride()[:3], tokens, heads, D=width, NU=nu, DV=values,
            BT=tiles.tokens, BF=tiles.keys, BV=tiles.values, HAS_BASE=A is not None,
            HAS_Z=weights_z is not None, PRECISION=precision(x.dtype, is_hip()),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, out_z


def _features_backward(
    x: Tensor, p: Tensor, z: Tensor | None, e: Tensor | None, nu: int, normalize: bool,
    eps: float, shares: Tensor | None = None, gammas: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradient of x; for a read (no gammas) also each token's weights for A and z."""
    batch, heads, tokens, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weights, weights_z = (_empty(x, batch, heads, tokens) for _ in range(2))
    x = rows(x)
    tiles = armt_tiles("features_bwd", width, x.dtype, is_hip())
    with on_device_of(x):
        kernels.features_bwd_kernel[(triton.cdiv(tokens, tiles.tokens), batch * heads)](
            x, p, p if z is None else z.contiguous(), p if e is None else e.contiguous(),
            p if shares is None else shares.contiguous(),
            p if gammas is None else gammas.contiguous(), dx, weights, weights_z,
            *x.stride()[:3], tokens, heads, eps, D=width, NU=nu,
            BT=tiles.tokens, BF=tiles.keys, BD=min(tiles.values, padded(width)),
            HAS_Z=z is not None, HAS_E=e is not None, NORMALIZE=normalize, READ=shares is None,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return dx, weights, weights_z


@torch.library.custom_op(add_op_namespace_prefix("armt_read"), mutates_args=())
def read(q: Tensor, A: Tensor, z: Tensor | None, nu: int, normalize: bool, eps: float) -> Tensor:
    """Compute `phi(q) A / (phi(q) z + eps)`, or `phi(q) A` without z: `(B, H, T, V)` in float32."""
    if not q.numel() or not A.shape[-1]:
        return q.new_zeros((*q.shape[:3], A.shape[-1]), dtype=torch.float32)
    return _read(q, A, z, nu, normalize, eps, stats=False)[0]


@read.register_fake
def _(q: Tensor, A: Tensor, z: Tensor | None, nu: int, normalize: bool, eps: float) -> Tensor:
    return q.new_empty((*q.shape[:3], A.shape[-1]), dtype=torch.float32)


@torch.library.custom_op(add_op_namespace_prefix("armt_read_backward"), mutates_args=())
def read_backward(
    dout: Tensor, q: Tensor, A: Tensor, z: Tensor | None, nu: int, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of q, A and z (an empty tensor without z)."""
    if not q.numel() or not A.shape[-1]:
        none = q.new_zeros(0, dtype=torch.float32)
        dA = torch.zeros(A.shape, device=A.device)
        dz = none if z is None else torch.zeros(z.shape, device=z.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), dA, dz
    p = _project(dout, A, q.dtype)
    dq, weights, weights_z = _features_backward(q, p, z, None, nu, normalize, eps)
    dA, own_dz = _write(q, dout, weights, None if z is None else weights_z, nu)
    return dq, dA, q.new_zeros(0, dtype=torch.float32) if own_dz is None else own_dz


@read_backward.register_fake
def _(
    dout: Tensor, q: Tensor, A: Tensor, z: Tensor | None, nu: int, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dz = q.new_empty(0 if z is None else z.shape, dtype=torch.float32)
    return q.new_empty(q.shape), A.new_empty(A.shape, dtype=torch.float32), dz


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, A, z, ctx.nu, ctx.normalize, ctx.eps = inputs
    ctx.save_for_backward(q, A, z)


def _grad_read(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    q, A, z = ctx.saved_tensors
    dq, dA, dz = read_backward(dout, q, A, z, ctx.nu, ctx.normalize, ctx.eps)
    return dq, dA, None if z is None else dz, None, None, None


read.register_autograd(_grad_read, setup_context=_save_read)


def _previous(
    k: Tensor, A: Tensor, z: Tensor | None, written: Tensor, nu: int, normalize: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read what the memory returns for the keys (0 where nothing was written), r, d, |phi|^2."""
    old_values, scale, denominator, squared = _read(k, A, z, nu, normalize, eps, stats=True)
    return old_values.masked_fill(~written.view(-1, 1, 1, 1), 0.0), scale, denominator, squared


def _gamma(
    denominator: Tensor, squared: Tensor, written: Tensor, correction: bool, key_eps: float
) -> Tensor:
    """Compute `clip(1 - d / |phi|^2, 0, 1)`, 1 on the first write of a row: `(B, H, T)`."""
    if not correction:
        return torch.ones_like(denominator)
    squared = squared + key_eps
    ratio = torch.where(squared > 0, denominator / squared.clamp_min(1e-38), 1.0)
    return (1 - ratio).clamp(0, 1).masked_fill(~written.view(-1, 1, 1), 1.0)


@torch.library.custom_op(add_op_namespace_prefix("armt_write"), mutates_args=())
def write(
    k: Tensor, v: Tensor, beta: Tensor, A: Tensor, z: Tensor | None, written: Tensor, nu: int,
    normalize: bool, correction: bool, key_eps: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `A += sum phi(k)^T beta (v - v_prev)`, `z += sum gamma phi(k)`; z is empty without
    one."""
    none = k.new_zeros(0, dtype=torch.float32)
    if not k.numel() or not v.numel():
        return A.clone(), none if z is None else z.clone()
    old_values, scale, denominator, squared = _previous(k, A, z, written, nu, normalize, eps)
    change = beta.float() * (v.float() - old_values)
    gamma = _gamma(denominator, squared, written, correction, key_eps)
    new_A, new_z = _write(k, change, scale, None if z is None else gamma * scale, nu, A, z)
    return new_A, none if new_z is None else new_z


@write.register_fake
def _(
    k: Tensor, v: Tensor, beta: Tensor, A: Tensor, z: Tensor | None, written: Tensor, nu: int,
    normalize: bool, correction: bool, key_eps: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return A.new_empty(A.shape), A.new_empty(0 if z is None else z.shape)


@torch.library.custom_op(add_op_namespace_prefix("armt_write_backward"), mutates_args=())
def write_backward(
    E: Tensor, e: Tensor, k: Tensor, v: Tensor, beta: Tensor, A: Tensor, z: Tensor | None,
    written: Tensor, nu: int, normalize: bool, correction: bool, key_eps: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of k, v, beta, A and z from those of the new A (E) and z (e)."""
    if not k.numel() or not v.numel():
        zeros = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, beta))
        return (*zeros, E.clone(), e.clone())  # type: ignore[return-value]
    old_values, scale, denominator, squared = _previous(k, A, z, written, nu, normalize, eps)
    gamma = _gamma(denominator, squared, written, correction, key_eps)
    into = _read(k, E, None, nu, normalize, eps, stats=False)[0]  # the gradient of the change
    strength, difference = beta.float(), v.float() - old_values
    dv, dbeta = into * strength, into * difference
    d_old_values = (-dv).masked_fill(~written.view(-1, 1, 1, 1), 0.0)
    share = None if z is None else -(d_old_values * old_values).sum(-1) / denominator
    p = _project(strength * difference, E, k.dtype)
    p = p + _project(d_old_values / denominator.unsqueeze(-1), A, k.dtype)
    own_e = None if z is None else e
    dk, _, _ = _features_backward(
        k, p, z, own_e, nu, normalize, eps, shares=gamma if share is None else share, gammas=gamma
    )
    weights_z = None if share is None else share * scale
    dA, dz = _write(k, d_old_values, scale / denominator, weights_z, nu, E, own_e)
    if beta.shape[-1] != v.shape[-1]:
        dbeta = dbeta.sum(-1, keepdim=True)
    none = k.new_zeros(0, dtype=torch.float32)
    return dk, dv.to(v.dtype), dbeta.to(beta.dtype), dA, none if dz is None else dz


@write_backward.register_fake
def _(
    E: Tensor, e: Tensor, k: Tensor, v: Tensor, beta: Tensor, A: Tensor, z: Tensor | None,
    written: Tensor, nu: int, normalize: bool, correction: bool, key_eps: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = tuple(x.new_empty(x.shape) for x in (k, v, beta, A))
    return (*made, A.new_empty(0 if z is None else z.shape))  # type: ignore[return-value]


def _save_write(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _grad_write(ctx: Any, E: Tensor, e: Tensor) -> tuple[Any, ...]:
    dk, dv, dbeta, dA, dz = write_backward(E, e, *ctx.saved_tensors, *ctx.rest)
    without = ctx.saved_tensors[4] is None
    return dk, dv, dbeta, dA, None if without else dz, None, *[None] * len(ctx.rest)


write.register_autograd(_grad_write, setup_context=_save_write)
