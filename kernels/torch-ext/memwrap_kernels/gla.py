"""Gated linear attention as a differentiable operator, chunked, and its step for decoding.

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T        o_t = scale * q_t S_t

Shapes: q `(B, H, T, Dk)`, k `(B, Hkv, T, Dk)`, v `(B, Hkv, T, Dv)`, g `(B, Hkv, T, Dk)`,
`(B, Hkv, T)` or None, states `(N, Hkv, Dk, Dv)` in float32; query head h reads state
`h // (H / Hkv)`. N is B, or the number of sequences that are joined in one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import gla_bwd_kernels as bwd_kernels
from . import gla_kernels as kernels
from .launch import is_hip, on_device_of, rows, rule
from .namespace import add_op_namespace_prefix
from .tiles import chunk_size, gla_tiles

__all__ = ["scan", "unsupported"]


def scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read and write a stretch of tokens, forward and backward.

    Args:
        q, k, v, g, state: as above; q, k and v in bfloat16, float16 or float32, all of one. Log
            gates are finite and at most 0.
        scale: of the queries.
        cu_seqlens: `(N + 1,)` integers from 0 to T: with B = 1, sequences joined in one row.

    Returns:
        What each token read, `(B, H, T, Dv)` in v's dtype, and the last states in float32.

    Raises:
        ValueError: for dtypes and head dims that `unsupported` names.
    """
    reason = unsupported(q, k, v)
    if reason:
        raise ValueError(f"The kernels of gated linear attention cannot do this: {reason}.")
    table, spans = tables(cu_seqlens, q.shape[2])
    return forward(q, k, v, g, state, table, spans, scale)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Tell why the kernels cannot take a call; empty if they can."""
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not (
        q.dtype == k.dtype == v.dtype
    ):
        return (
            f"q, k and v in {q.dtype}, {k.dtype} and {v.dtype}; they take bfloat16, float16 or "
            "float32, all of one"
        )
    return ""


def tables(cu_seqlens: Tensor | None, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """List (first token, end, slot) of each chunk and (first chunk, chunks, first slot) of each
    sequence, without asking the GPU: there may be chunks without tokens at the end."""
    if cu_seqlens is None:
        return None, None
    size = chunk_size(tokens)
    cu = cu_seqlens.long()
    counts = (cu.diff() + size - 1) // size
    ends = counts.cumsum(0)
    index = torch.arange(tokens // size + len(counts), device=cu.device)
    owner = torch.searchsorted(ends, index, right=True).clamp_max(len(counts) - 1)
    inside = index - (ends - counts)[owner]
    first = cu[owner] + inside * size
    last = torch.minimum(first + size, cu[owner + 1])
    empty = index >= ends[-1]
    first, last = (torch.where(empty, tokens, x) for x in (first, last))
    slot = torch.where(empty, 0, index + owner)
    number = torch.arange(len(counts), device=cu.device)
    spans = torch.stack([ends - counts, counts, ends - counts + number], 1)
    return torch.stack([first, last, slot], 1).int(), spans.int()


class _Call:
    """Sizes, gates summed up, and the launches that forward and backward share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
        table: Tensor | None, spans: Tensor | None, scale: float, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.dtype, self.precision = dtype, rule(dtype, is_hip())
        self.q, self.k, self.v, self.scale = rows(q), rows(k), rows(v), scale
        self.batch, self.readers, self.tokens, self.keys = q.shape
        self.heads, self.values = k.shape[1], v.shape[-1]
        self.group, self.size = self.readers // self.heads, chunk_size(self.tokens)
        self.chunks = triton.cdiv(self.tokens, self.size) if table is None else len(table)
        self.slots = self.chunks + (1 if spans is None else len(spans))
        self.sequences = len(state)
        self.gate = 0 if g is None else 1 if g.dim() == 3 else 2
        self.table = self.q if table is None else table
        self.spans = self.q if spans is None else spans
        self.has_table = table is not None
        self.gates = self.q if g is None else self.cumulated(g)

    def constants(self, kernel: str, *names: str) -> dict[str, Any]:
        tiles = gla_tiles(kernel, self.keys, self.values, self.gate, self.dtype, is_hip())
        constants = {
            "DK": self.keys, "DV": self.values, "BK": tiles.keys, "BV": tiles.values,
            "C": self.size, "GATE": self.gate, "LEVELS": self.size.bit_length() - 1,
            "HAS_TABLE": self.has_table, "PRECISION": self.precision,
        }  # fmt: skip
        return {name: constants[name] for name in names} | {
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def cumulated(self, g: Tensor) -> Tensor:
        out = torch.empty(g.shape, device=g.device, dtype=torch.float32)
        g = rows(g) if self.gate == 2 else g
        width = self.keys if self.gate == 2 else 1
        block = min(64, max(16, triton.next_power_of_2(width)))
        with on_device_of(g):
            kernels.cumulate_kernel[
                (self.chunks * triton.cdiv(width, block), self.batch * self.heads)
            ](
                g, out, self.table, *g.stride()[:3], self.tokens, self.heads, W=width, BW=block,
                C=self.size, HAS_TABLE=self.has_table, num_warps=4, num_stages=1,
            )  # fmt: skip
        return out

    def states(self, x: Tensor, y: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """Compute the states of keys and values; reversed: their gradients, of queries and outputs'
        gradients."""
        shape = (self.batch, self.heads, self.slots, self.keys, self.values)
        out = torch.empty(shape, device=x.device, dtype=torch.float32)
        given = self.constants(
            "states", "DK", "DV", "BK", "BV", "C", "GATE", "HAS_TABLE", "PRECISION"
        )
        blocks = triton.cdiv(self.keys, given["BK"]) * triton.cdiv(self.values, given["BV"])
        with on_device_of(x):
            kernels.states_kernel[(blocks, self.sequences * self.heads)](
                x, y, self.gates, out, initial.contiguous(), self.table, self.spans,
                *x.stride()[:3], *y.stride()[:3], self.tokens, self.chunks, self.slots, self.heads,
                self.group if reverse else 1, self.scale if reverse else 1.0, REVERSE=reverse,
                **given,
            )  # fmt: skip
        return out

    def scores(self, x: Tensor, y: Tensor, gated: bool = True) -> Tensor:
        """Compute A, or dA for gradients of outputs, values and no gate."""
        shape = (self.batch, self.readers, self.tokens, self.size)
        out = torch.empty(shape, device=x.device, dtype=torch.float32)
        given = self.constants("scores", "BK", "C", "LEVELS", "HAS_TABLE", "PRECISION")
        with on_device_of(x):
            kernels.scores_kernel[(self.chunks, self.batch * self.readers)](
                x, y, self.gates, out, self.table, *x.stride()[:3], *y.stride()[:3], self.tokens,
                self.heads, self.group, self.scale, DK=x.shape[-1],
                GATE=self.gate if gated else 0, **given,
            )  # fmt: skip
        return out

    def read(self, states: Tensor, scores: Tensor, values: Tensor, out: Tensor) -> None:
        """Read for the tokens, into `out`."""
        given = self.constants(
            "output", "DK", "DV", "BK", "BV", "C", "GATE", "HAS_TABLE", "PRECISION"
        )
        blocks = self.chunks * triton.cdiv(self.values, given["BV"])
        with on_device_of(out):
            kernels.output_kernel[(blocks, self.batch * self.readers)](
                self.q, values, self.gates, states, scores, out, self.table, *self.q.stride()[:3],
                *values.stride()[:3], self.tokens, self.slots, self.heads, self.group, self.scale,
                **given,
            )  # fmt: skip

    def keys_bwd(
        self, states: Tensor, grads: Tensor, values: Tensor, dout: Tensor, dq: Tensor, dk: Tensor
    ) -> Tensor:
        """Compute the gradients of queries and keys, into `dq` and `dk`, and of the gates in
        float32."""
        weights = self.scores(dout, values, gated=False)
        given = self.constants(
            "keys_bwd", "DK", "DV", "BK", "BV", "C", "LEVELS", "GATE", "HAS_TABLE", "PRECISION"
        )
        blocks, key_shape = triton.cdiv(self.keys, given["BK"]), self.k.shape
        shape = (blocks, *key_shape[:3]) if self.gate == 1 else key_shape if self.gate else (0,)
        dg = torch.empty(shape, device=dq.device, dtype=torch.float32)
        with on_device_of(dq):
            bwd_kernels.keys_bwd_kernel[(self.chunks * blocks, self.batch * self.heads)](
                self.q, self.k, values, self.gates, states, grads, weights, dout, dq, dk, dg,
                self.table, *self.q.stride()[:3], *self.k.stride()[:3], *values.stride()[:3],
                *dout.stride()[:3], self.tokens, self.slots, self.heads, self.group,
                self.k[..., 0].numel(), self.scale, **given,
            )  # fmt: skip
        return dg.sum(0) if self.gate == 1 else dg

    def last(self, states: Tensor) -> Tensor:
        """Compute the states after the last token of each sequence."""
        if not self.has_table:
            return states[:, :, -1].clone()
        return states[0].index_select(1, (self.spans[:, 2] + self.spans[:, 1]).long()).transpose(
            0, 1
        ).contiguous()  # fmt: skip

    def first(self, states: Tensor) -> Tensor:
        if not self.has_table:
            return states[:, :, 0].clone()
        return states[0].index_select(1, self.spans[:, 2].long()).transpose(0, 1).contiguous()


@torch.library.custom_op(add_op_namespace_prefix("gla"), mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, table: Tensor | None,
    spans: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `scan` with the tables of `tables`."""
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=v.dtype, device=v.device)
    if not q.numel() or not v.numel():
        return out.zero_(), state.clone()
    call = _Call(q, k, v, g, state, table, spans, scale, v.dtype)
    states = call.states(call.k, call.v, state, reverse=False)
    scores = call.scores(call.q, call.k)
    call.read(states, scores, call.v, out)
    return out, call.last(states)


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, table: Tensor | None,
    spans: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v.new_empty((*q.shape[:3], v.shape[-1])), state.new_empty(state.shape)


@torch.library.custom_op(add_op_namespace_prefix("gla_backward"), mutates_args=())
def backward(
    dout: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
    table: Tensor | None, spans: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k, v, g (empty without) and the first states."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel() or not v.numel():
        none = q.new_empty(0) if g is None else torch.zeros_like(g)
        return dq.zero_(), dk.zero_(), dv.zero_(), none, dlast.clone()
    call = _Call(q, k, v, g, state, table, spans, scale, v.dtype)
    dout = rows(dout)
    states = call.states(call.k, call.v, state, reverse=False)
    grads = call.states(call.q, dout, dlast, reverse=True)
    scores = call.scores(call.q, call.k)
    shapes = "DK", "DV", "BK", "BV", "C", "GATE", "HAS_TABLE", "PRECISION"
    given = call.constants("values_bwd", *shapes)
    with on_device_of(q):
        bwd_kernels.values_bwd_kernel[
            (call.chunks * triton.cdiv(call.values, given["BV"]), call.batch * call.heads)
        ](
            call.k, call.gates, grads, scores, dout, dv, call.table, *call.k.stride()[:3],
            *dout.stride()[:3], call.tokens, call.slots, call.heads, call.group, **given,
        )  # fmt: skip
    dg = call.keys_bwd(states, grads, call.v, dout, dq, dk)
    if g is not None:
        dg = dg.to(g.dtype)
    return dq, dk, dv, dg, call.first(grads)


@backward.register_fake
def _(
    dout: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
    table: Tensor | None, spans: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape),
        q.new_empty(0, dtype=torch.float32) if g is None else g.new_empty(g.shape),
        state.new_empty(state.shape),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Any, ...]:
    g = ctx.saved_tensors[3]
    dq, dk, dv, dg, dstate = backward(dout, dlast, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None if g is None else dg, dstate, None, None, None


forward.register_autograd(_grad, setup_context=_save)
