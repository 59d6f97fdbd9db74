"""Gated linear attention in fast torch; formulas in `memwrap.ops.gla`.

Tokens are cut into chunks. Between chunks only the state travels; inside a chunk all pairs of
tokens are done by matrix products. The decay between two tokens is split into a factor of the query
and one of the key, each from the chunk's first token on, and chunks are made so short that both
stay in range. Where even the shortest are too long, a chunk is halved again and again, and the
pairs of a later half with an earlier one meet at the seam: no factor is above 1 then, however
strong the gates are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64
SHORTEST = 16  # tokens of a chunk whose gates are strong
WEAK = 60.0  # a chunk's gates may halve a state so often: factors from 2 ** -60 to 2 ** 60
LOG2_E = math.log2(math.e)  # powers of two take torch a third of the time of powers of e
BLOCK = 512  # tokens whose intermediate results exist at a time
Parts = tuple[Tensor | None, ...]


def scan_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `gla.scan`."""
    if q.shape[2] == 1:
        return _token(q, k, v, g, state, scale)
    return in_blocks(partial(_block, scale=scale), (q, k, v, g, None), state)


def decayed(state: Tensor, g: Tensor | None) -> Tensor:
    """Compute the state behind one token's forget gate `(B, Hkv, 1)` or, by channel, `(B, Hkv, 1,
    Dk)`."""
    if g is None:
        return state
    decay = g.to(state.dtype).exp()
    return state * (decay.mT if decay.dim() == 4 else decay[..., None])


def read_token(q: Tensor, state: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Read for one token's queries `(B, H, 1, Dk)`: `(B, H, 1, Dv)`."""
    heads = state.shape[1]
    queries = q.to(state.dtype).squeeze(2).unflatten(1, (heads, -1)) * scale
    return (queries @ state).flatten(1, 2)[:, :, None].to(dtype)


def _token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Take in a single token, as in decoding: no chunk to be made."""
    state = torch.addcmul(decayed(state, g), k.to(state.dtype).mT, v.to(state.dtype))
    return read_token(q, state, scale, v.dtype), state


def scan_value_gated(
    q: Tensor, k: Tensor, v: Tensor, gv: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute `gla.scan` with a gate for each value channel, `(B, Hkv, T, Dv)`: the columns of the
    state decay instead of its rows."""
    return in_blocks(partial(_block, scale=scale), (q, k, v, None, gv), state)


def in_blocks(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: Parts, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run `function(*tensors, state)` over blocks of tokens; for several, the backward pass makes
    a block's intermediate results again."""
    q, v = tensors[0], tensors[2]
    tokens = q.shape[2]  # type: ignore[union-attr]
    if not tokens:
        return v.new_zeros(*q.shape[:3], v.shape[3]), state.clone()  # type: ignore[union-attr]
    if tokens <= BLOCK:
        return function(*tensors, state)
    parts = [
        [None if x is None else x[:, :, start : start + BLOCK] for x in tensors]
        for start in range(0, tokens, BLOCK)
    ]
    if not torch.is_grad_enabled():
        whole = v.new_empty(*q.shape[:3], v.shape[3])  # type: ignore[union-attr]
        for part, place in zip(parts, whole.split(BLOCK, 2), strict=True):
            out, state = function(*part, state)
            place.copy_(out)
        return whole, state
    again: Any = {"use_reentrant": False, "preserve_rng_state": False}
    outs = []
    for part in parts:
        out, state = checkpoint(function, *part, state, **again)
        outs.append(out)
    return torch.cat(outs, 2), state


def chunk_size(tokens: int) -> int:
    """Return a power of two, at most `CHUNK`."""
    return min(CHUNK, 1 << (tokens - 1).bit_length())


def chunked(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Cut into chunks, `(B, H, T, ...)` -> `(B, H, N, C, ...)`, the last one filled with zeros.
    Contiguous, or every product with it would copy it."""
    missing = -x.shape[2] % size
    x = x.to(dtype)
    if missing:
        x = F.pad(x, (*[0, 0] * (x.dim() - 3), 0, missing))
    return x.contiguous().unflatten(2, (-1, size))


def grouped(q: Tensor, heads: int, size: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Group scaled queries by state: `(B, H, T, D)` -> `(B, Hkv, N, C, G, D)`."""
    return chunked(q.unflatten(1, (heads, -1)).transpose(2, 3).to(dtype) * scale, size, dtype)


def ungrouped(out: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Undo `grouped`: `(B, Hkv, N, C, G, D)` -> `(B, H, T, D)`."""
    return out.flatten(2, 3)[:, :, :tokens].transpose(2, 3).flatten(1, 2).to(dtype)


def carried(state: Tensor, decay: Tensor | None, written: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the states before each chunk, `(B, H, N, Dk, Dv)`, and after the last one.

    Args:
        state: `(B, H, Dk, Dv)`, before the first chunk.
        decay: a chunk's factor, that broadcasts against `written`; None for 1.
        written: `(B, H, N, Dk, Dv)`.
    """
    states = [state]
    for n, new in enumerate(written.unbind(2)):
        old = states[-1]
        states.append(old + new if decay is None else torch.addcmul(new, decay[:, :, n], old))
    return torch.stack(states[:-1], 2), states[-1]


def _block(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, gv: Tensor | None, state: Tensor, *,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute a block: `g` gates channels of keys, `(B, Hkv, T, Dk)`, or whole heads, `gv` channels
    of values."""
    tokens, dtype = q.shape[2], state.dtype
    size, logs, strong = chunk_size(tokens), None, False
    if g is not None or gv is not None:
        gates = gv if g is None else g if g.dim() == 4 else g[..., None]
        gates = gates.to(dtype) * LOG2_E  # type: ignore[union-attr]
        size, strong = allowed_length(chunked(gates, size, dtype))
        logs = chunked(gates, size, dtype)
    queries = grouped(q, k.shape[1], size, scale, dtype)
    keys, values = chunked(k, size, dtype), chunked(v, size, dtype)
    if logs is None:
        before, state = carried(state, None, keys.mT @ values)
        out = _read(queries, keys, values, before)
    else:
        function = _halved if strong else _scaled
        out, state = function(queries, keys, values, logs, gv is None, state)
    return ungrouped(out, tokens, v.dtype), state


def _read(q: Tensor, k: Tensor, v: Tensor, before: Tensor) -> Tensor:
    """Read for tokens their own chunk and the state before it, both without decay."""
    rows, size = q.flatten(-3, -2), k.shape[-2]
    seen = torch.ones(size, size, dtype=k.dtype, device=k.device).tril()
    scores = (rows @ k.mT).unflatten(-2, q.shape[-3:-1]) * seen[:, None]
    inner = (scores.flatten(-3, -2) @ v).flatten(0, 2)
    out = torch.baddbmm(inner, rows.flatten(0, 2), before.flatten(0, 2))
    return out.view(*q.shape[:-1], v.shape[-1])


def _scaled(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, of_keys: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a block for gates in range: everything is told from a chunk's first token on. Rows of
    a state, or its columns, then do not decay inside the chunk, but all at once behind it."""
    prefix = g.cumsum(-2)
    after, rest = prefix.exp2(), prefix.neg().exp2()
    if of_keys:
        q, k = q * after[..., None, :], k * rest
        decay = after[..., -1, :, None]
    else:
        v = v * rest
        decay = after[..., -1:, :]
    before, state = carried(state, decay, (k.mT @ v) * decay)
    out = _read(q, k, v, before)
    return (out if of_keys else out * after[..., None, :]), state


def _halved(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, of_keys: bool, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a block for gates of any strength."""
    out, prefix, suffix = _by_halves(q, k, v, g, of_keys)
    after, rest = prefix.exp2(), suffix.exp2()
    k, v = (k * rest, v) if of_keys else (k, v * rest)
    before, state = carried(
        state, after[..., -1, :, None] if of_keys else after[..., -1:, :], k.mT @ v
    )
    q = q * after[..., None, :] if of_keys else q
    read = (q.flatten(-3, -2) @ before).view_as(out)
    return out + (read if of_keys else read * after[..., None, :]), state


def allowed_length(logs: Tensor) -> tuple[int, bool]:
    """Tell how many tokens a chunk may have, of at most C in `(..., C, D)`, for the gates to stay
    in range; and whether they are so strong that none may (a compiler must think so)."""
    longest = size = logs.shape[-2]
    if torch.compiler.is_compiling():
        return longest, True
    while float(logs.detach().unflatten(-2, (-1, size)).sum(-2).amin()) < -WEAK:
        if size <= SHORTEST:
            return longest, True
        size //= 2
    return size, False


def _by_halves(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, of_keys: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Read for the tokens of a chunk the same chunk, for gates of any strength.

    Args:
        g: a gate a channel, of the keys or of the values.

    Returns:
        The output, and sums of the gates from the chunk's first token up to each one, and from
        behind each one up to the last.
    """
    out = (q * k[..., None, :]).sum(-1, keepdim=True) * v[..., None, :]  # a token and itself
    prefix, suffix, size = g, torch.zeros_like(g), 1
    while size < k.shape[-2]:
        halves = (-1, 2, size)
        late_q = q.unflatten(-3, halves)[..., 1, :, :, :]
        early_k, early_v = (x.unflatten(-2, halves)[..., 0, :, :] for x in (k, v))
        early_sum, late_sum = prefix.unflatten(-2, halves).unbind(-3)
        early_rest, late_rest = suffix.unflatten(-2, halves).unbind(-3)
        late_decay, early_decay = late_sum.exp2()[..., None, :], early_rest.exp2()
        if of_keys:
            late_q, early_k = late_q * late_decay, early_k * early_decay
        else:
            early_v = early_v * early_decay
        scores = late_q.flatten(-3, -2) @ early_k.transpose(-1, -2)
        read = (scores @ early_v).unflatten(-2, late_q.shape[-3:-1])
        late_out = out.unflatten(-3, halves)[..., 1, :, :, :]
        late_out += read if of_keys else read * late_decay
        whole_early, whole_late = early_sum[..., -1:, :], late_sum[..., -1:, :]
        prefix = torch.stack([early_sum, late_sum + whole_early], -3).flatten(-4, -2)
        suffix = torch.stack([early_rest + whole_late, late_rest], -3).flatten(-4, -2)
        size *= 2
    return out, prefix, suffix
