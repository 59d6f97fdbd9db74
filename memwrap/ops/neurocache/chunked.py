"""Neurocache's attention in fast torch; arguments and shapes in `memwrap.ops.neurocache`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_GATHERED_AT_ONCE = 2**25
_HIDDEN = -1e30


def attend_chunked(
    query: Tensor, states: Tensor, valid: Tensor, column: Tensor, present: Tensor,
    key_weight: Tensor, value_weight: Tensor, layout: str,
) -> Tensor:  # fmt: skip
    batch, length, heads, _ = query.shape
    groups = key_weight.shape[0]
    grouped = query.unflatten(2, (groups, heads // groups))
    if layout == "heads":  # W_k goes to the query, W_v behind the sum: only states are gathered
        grouped = torch.einsum("btgre,ged->btgrd", grouped, key_weight)
        keys = values = states[:, :, None]
        mask = valid[:, :, None]
    else:
        keys, values = (
            torch.einsum("bmnd,ged->bmnge", states, w).reshape(
                *states.shape[:2], groups, states.shape[2], -1
            )
            for w in (key_weight, value_weight)
        )
        mask = valid.repeat_interleave(groups, 2).unflatten(2, (groups, -1))
    per_query = batch * column.shape[2] * keys[0, 0].numel() * 2
    size = max(1, _GATHERED_AT_ONCE // max(1, per_query))
    blocks = list(
        zip(grouped.split(size, 1), column.split(size, 1), present.split(size, 1), strict=True)
    )
    parts = []
    for block in blocks:
        if len(blocks) > 1 and torch.is_grad_enabled():  # gathered states are not kept
            part = checkpoint(_block, *block, keys, values, mask, use_reentrant=False)
        else:
            part = _block(*block, keys, values, mask)
        parts.append(part)
    out = torch.cat(parts, 1)
    if layout == "heads":
        out = torch.einsum("btgrd,ged->btgre", out, value_weight)
    return out.reshape(batch, length, heads, -1)


def _block(
    query: Tensor, column: Tensor, present: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """Attend in a block: `(B, t, g, r, D)` of queries `(B, t, g, r, D)` over `(B, M, g or 1, N,
    D)`."""
    same = keys is values
    rows = _columns(keys, column)
    visible = _columns(mask, column, present)[:, :, :, None]
    scores = (query @ rows.transpose(-1, -2)).masked_fill(~visible, _HIDDEN)
    weights = scores.softmax(-1) * visible
    return weights @ (rows if same else _columns(values, column))


def _columns(x: Tensor, column: Tensor, present: Tensor | None = None) -> Tensor:
    """Gather what queries' columns hold: `(B, M, g, N, ...)` to `(B, t, g, w N, ...)`."""
    batch, count = x.shape[:2]
    first = torch.arange(batch, device=x.device)[:, None, None] * count
    rows = x.flatten(0, 1).index_select(0, (column + first).flatten())
    rows = rows.view(*column.shape, *x.shape[2:])
    if present is not None:
        rows = rows & present[..., None, None]
    return rows.transpose(2, 3).flatten(3, 4)
