"""The delta rule and the gated delta rule as differentiable operators, and a step for decoding.

    S' = exp(g_t) * S_{t-1}
    S_t = S' + k_t (beta_t * (v_t - k_t S'))^T        o_t = scale * q_t S_t

Shapes as in `memwrap_kernels.gla`; beta and g are `(B, Hkv, T)`. What a chunk's tokens write is
solved for in torch (small triangular systems, all chunks at once); what goes from chunk to chunk
and what is read are kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import delta_kernels as kernels
from . import gla
from .launch import is_hip, on_device_of, rows
from .namespace import add_op_namespace_prefix
from .tiles import MAX_HEAD_DIM, chunk_size, delta_tiles, padded

__all__ = ["scan", "step", "unsupported"]


def scan(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor, scale: float,
    l2norm: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read and write a stretch of tokens, forward and backward.

    Args:
        q, k, v, g, state, scale, cu_seqlens: as for `gla.scan`; g is a number a head, or None.
        beta: strength of the write, `(B, Hkv, T)`.
        l2norm: make queries and keys unit vectors first, `x / sqrt(sum(x^2) + 1e-6)`.

    Returns:
        What each token read, `(B, H, T, Dv)` in v's dtype, and the last states in float32.

    Raises:
        ValueError: for what `unsupported` names.
    """
    reason = unsupported(q, k, v, beta)
    if reason:
        raise ValueError(f"The kernels of the delta rule cannot do this: {reason}.")
    if l2norm:
        q, k = unit(q), unit(k)
    table, spans = gla.tables(cu_seqlens, q.shape[2])
    u, w = solved(k, v, beta, g, table)
    return forward(q, k, u, w, g, state, table, spans, scale, v.dtype)


def unit(x: Tensor) -> Tensor:
    """Compute unit vectors in float32."""
    wide = x.float()
    return wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def unsupported(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> str:
    """Tell why the kernels cannot take a call; empty if they can."""
    if beta.dim() != 3:
        return "a beta for each value channel"
    # float32 states of wider keys take more than AMD's 64 KB of shared memory.
    limit = MAX_HEAD_DIM[k.dtype if is_hip() and k.dtype in MAX_HEAD_DIM else torch.bfloat16]
    if k.shape[-1] > limit:
        return f"keys of {k.shape[-1]} channels; with {k.dtype} they go up to {limit}"
    return gla.unsupported(q, k, v)


def solved(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return u `(B, Hkv, T, Dv)` and w `(B, Hkv, T, Dk)` in float32: a token writes `u - w S`, with
    S the state before its chunk."""
    tokens = k.shape[2]
    size = chunk_size(tokens)
    if table is None:
        missing = -tokens % size

        def cut(x: Tensor) -> Tensor:
            x = torch.nn.functional.pad(x.float(), (0, 0, 0, missing))
            return x.unflatten(2, (-1, size))

        def joined(x: Tensor) -> Tensor:
            return x.flatten(2, 3)[:, :, :tokens]
    else:
        place = table[:, :1].long() + torch.arange(size, device=k.device)
        real = place < table[:, 1:2]

        def cut(x: Tensor) -> Tensor:
            piece = x.float()[:, :, place.clamp_max(tokens - 1)]
            return piece.masked_fill(~real[..., None], 0.0)

        def joined(x: Tensor) -> Tensor:
            # Chunks without a token write to one place behind the others.
            index = torch.where(real, place, tokens).flatten()
            out = x.new_zeros(*x.shape[:2], tokens + 1, x.shape[-1])
            return out.index_copy(2, index, x.flatten(2, 3))[:, :, :tokens]

    keys, values, strengths = cut(k), cut(v), cut(beta[..., None])
    products = keys @ keys.transpose(-1, -2)
    faded = keys
    if g is not None:
        sums = cut(g[..., None]).cumsum(3)
        products = products * (sums - sums.transpose(-1, -2)).clamp_max(0.0).exp()
        faded = keys * sums.exp()
    inverse = _inverse((strengths * products).tril(-1))
    return joined(inverse @ (strengths * values)), joined(inverse @ (strengths * faded))


def _inverse(lower: Tensor) -> Tensor:
    """Compute `(I + L)^-1` of strictly lower triangular L: blocks are merged two by two."""
    size = lower.shape[-1]
    i = torch.arange(size, device=lower.device)
    inverse = torch.eye(size, device=lower.device, dtype=lower.dtype).expand_as(lower)
    half = 1
    while half < size:
        same = (i // (2 * half))[:, None] == (i // (2 * half))[None, :]
        part = same & ((i // half) % 2 == 1)[:, None] & ((i // half) % 2 == 0)[None, :]
        inverse = inverse - inverse @ (lower * part) @ inverse
        half *= 2
    return inverse


class _Call(gla._Call):
    """Sizes and launches of the delta rule."""

    def tiles(self) -> dict[str, Any]:
        tiles = delta_tiles(self.keys, self.dtype, is_hip())
        return {
            "DK": self.keys, "DV": self.values, "BK": tiles.keys, "BV": tiles.values,
            "C": self.size, "GATE": self.gate, "HAS_TABLE": self.has_table,
            "PRECISION": self.precision, "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def changes(self, u: Tensor, w: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Compute all states, and what each token writes."""
        shape = (self.batch, self.heads, self.slots, self.keys, self.values)
        states = torch.empty(shape, device=u.device, dtype=torch.float32)
        changes = torch.empty_like(u)
        given = self.tiles()
        with on_device_of(u):
            kernels.changes_kernel[
                (triton.cdiv(self.values, given["BV"]), self.sequences * self.heads)
            ](
                self.k, u, w, self.gates, states, changes, initial.contiguous(), self.table,
                self.spans, *self.k.stride()[:3], self.tokens, self.chunks, self.slots, self.heads,
                **given,
            )  # fmt: skip
        return states, changes

    def changes_bwd(
        self, w: Tensor, scores: Tensor, dout: Tensor, dlast: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of all states, and of what each token writes."""
        shape = (self.batch, self.heads, self.slots, self.keys, self.values)
        grads = torch.empty(shape, device=w.device, dtype=torch.float32)
        dchanges = torch.empty((*w.shape[:3], self.values), device=w.device, dtype=torch.float32)
        given = self.tiles()
        with on_device_of(w):
            kernels.changes_bwd_kernel[
                (triton.cdiv(self.values, given["BV"]), self.sequences * self.heads)
            ](
                self.q, self.k, w, self.gates, scores, dout, grads, dchanges, dlast.contiguous(),
                self.table, self.spans, *self.q.stride()[:3], *self.k.stride()[:3],
                *dout.stride()[:3], self.tokens, self.chunks, self.slots, self.heads, self.group,
                self.scale, **given,
            )  # fmt: skip
        return grads, dchanges

    def readers_bwd(self, states: Tensor, dchanges: Tensor) -> Tensor:
        out = torch.empty(
            (*dchanges.shape[:3], self.keys), device=dchanges.device, dtype=torch.float32
        )
        given = self.constants("readers_bwd", "DK", "DV", "BK", "BV", "C", "HAS_TABLE", "PRECISION")
        with on_device_of(out):
            kernels.readers_bwd_kernel[
                (self.chunks * triton.cdiv(self.keys, given["BK"]), self.batch * self.heads)
            ](states, dchanges, out, self.table, self.tokens, self.slots, **given)
        return out


@torch.library.custom_op(add_op_namespace_prefix("delta"), mutates_args=())
def forward(
    q: Tensor, k: Tensor, u: Tensor, w: Tensor, g: Tensor | None, state: Tensor,
    table: Tensor | None, spans: Tensor | None, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `scan` with what `solved` found; the output is in `dtype`."""
    out = torch.empty((*q.shape[:3], u.shape[-1]), dtype=dtype, device=u.device)
    if not q.numel() or not u.numel():
        return out.zero_(), state.clone()
    call = _Call(q, k, u, g, state, table, spans, scale, dtype)
    states, changes = call.changes(call.v.contiguous(), w.contiguous(), state)
    call.read(states, call.scores(call.q, call.k), changes, out)
    return out, call.last(states)


@forward.register_fake
def _(
    q: Tensor, k: Tensor, u: Tensor, w: Tensor, g: Tensor | None, state: Tensor,
    table: Tensor | None, spans: Tensor | None, scale: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = u.new_empty((*q.shape[:3], u.shape[-1]), dtype=dtype)
    return out, state.new_empty(state.shape)


@torch.library.custom_op(add_op_namespace_prefix("delta_backward"), mutates_args=())
def backward(
    dout: Tensor, dlast: Tensor, q: Tensor, k: Tensor, u: Tensor, w: Tensor, g: Tensor | None,
    state: Tensor, table: Tensor | None, spans: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, u, w, g (empty without) and the first states."""
    if not q.numel() or not u.numel():
        none = q.new_empty(0) if g is None else torch.zeros_like(g)
        dq, dk, du, dw = (torch.zeros_like(x) for x in (q, k, u, w))
        return dq, dk, du, dw, none, dlast.clone()
    call = _Call(q, k, u, g, state, table, spans, scale, dout.dtype)
    dout, w = rows(dout), w.contiguous()
    states, changes = call.changes(call.v.contiguous(), w, state)
    grads, du = call.changes_bwd(w, call.scores(call.q, call.k), dout, dlast)
    dw = call.readers_bwd(states, du)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dg = call.keys_bwd(states, grads, changes, dout, dq, dk)
    if g is not None:
        dg = dg.to(g.dtype)
    return dq, dk, du, dw, dg, call.first(grads)


@backward.register_fake
def _(
    dout: Tensor, dlast: Tensor, q: Tensor, k: Tensor, u: Tensor, w: Tensor, g: Tensor | None,
    state: Tensor, table: Tensor | None, spans: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = q.new_empty(0, dtype=torch.float32) if g is None else g.new_empty(g.shape)
    dq, dk, du, dw = (x.new_empty(x.shape) for x in (q, k, u, w))
    return dq, dk, du, dw, dg, state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Any, ...]:
    *grads, dg, dstate = backward(dout, dlast, *ctx.saved_tensors, ctx.scale)
    return (*grads, None if ctx.saved_tensors[4] is None else dg, dstate, *[None] * 4)


forward.register_autograd(_grad, setup_context=_save)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a few tokens without gradients, for decoding: one launch, the state in registers.

    Args:
        q, k, v, g, state, scale: as for `gla.scan` without `cu_seqlens`.
        beta: None for gated linear attention; for the delta rule `(B, Hkv, T)`, or
            `(B, Hkv, T, Dv)`, a strength for each value channel.

    Returns:
        What each token read, in v's dtype, and the last states in float32.
    """
    reason = gla.unsupported(q, k, v)
    if k.shape[-1] > MAX_HEAD_DIM[torch.bfloat16]:
        reason = f"keys of {k.shape[-1]} channels"
    if reason:
        raise ValueError(f"The step's kernel cannot do this: {reason}.")
    return step_op(q, k, v, g, beta, state, scale)


@torch.library.custom_op(add_op_namespace_prefix("recurrent_step"), mutates_args=())
def step_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `step`."""
    batch, readers, tokens, keys = q.shape
    heads, values = k.shape[1], v.shape[-1]
    out = torch.empty((*q.shape[:3], values), dtype=v.dtype, device=v.device)
    if not out.numel() or not keys:
        return out.zero_(), state.clone()
    last = torch.empty(state.shape, dtype=torch.float32, device=v.device)
    q, k, v, state = rows(q), rows(k), rows(v), state.contiguous()
    wide, block = padded(keys), min(32, padded(values))
    given = [state if x is None else x.float().contiguous() for x in (g, beta)]
    with on_device_of(q):
        kernels.step_kernel[(triton.cdiv(values, block), batch * heads)](
            q, k, v, *given, state, out, last, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            tokens, heads, readers // heads, scale, DK=keys, DV=values, BK=wide, BV=block,
            GATE=0 if g is None else g.dim() - 2, BETA=0 if beta is None else beta.dim() - 2,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out, last


@step_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v.new_empty((*q.shape[:3], v.shape[-1])), state.new_empty(state.shape)
