"""One softmax over what a memory has attended to by itself and the segment's own keys.

Retrieved entries differ from query to query, so they cannot stand in front of the segment as rows
(`LayerAttention.join`). But all that a softmax needs to know of them is the logarithm of their
summed exponentials: one more key whose score is just that gets exactly the weight of all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memwrap.backbones.joining import attend_beside, flashes
from memwrap.backbones.layer_attention import LayerAttention
from memwrap.ops import narrowed


def merge_attention_states(
    attention: LayerAttention, out: Tensor, logsumexp: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Attend in one softmax to the segment's own keys and to entries that a memory has attended to.

    Args:
        attention: the layer's.
        out: `(B, H, T, Dv)`, the entries' values, weighted by a softmax over them alone.
        logsumexp: `(B, H, T)` of their scores, scaled and capped as the model's attention does
            it; -inf for a query that has none.
        count: most entries of a query.

    Returns:
        The output `(B, T, H, Dv)`, and the weight `(B, H, T)` that the entries got together.
    """
    if flashes(attention):
        result, total = attend_beside(attention, out, logsumexp)
        return result, (logsumexp - total).exp()
    query, key, value = attention.rotated_query, attention.rotated_key, attention.value
    dtype, wide = query.dtype, logsumexp.dtype
    finite = logsumexp > -math.inf
    score = logsumexp.masked_fill(~finite, 0.0)
    keys = 1
    if attention.softcap is not None:  # several keys share the sum, since one could not reach it
        keys, cap = count, attention.softcap
        score = cap * torch.atanh(((score - math.log(count)) / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    score = score / attention.rotated_scaling
    high = narrowed(score, dtype)  # and the rest: half types hold a score too coarsely
    parts = torch.stack([high, narrowed(score - high.to(wide), dtype)], -1)
    queries = torch.cat([query, parts], -1)
    pad = torch.nn.functional.pad
    summary = key.new_zeros(*key.shape[:2], keys, key.shape[-1] + 2)
    summary[..., -2:] = 1.0
    marked = value.new_zeros(*value.shape[:2], keys, value.shape[-1] + 1)
    marked[..., -1] = 1.0
    visible = attention.visible().expand(-1, queries.shape[1], -1, -1)
    visible = torch.cat([finite[..., None].expand(-1, -1, -1, keys), visible], -1)
    joined = attention.function(
        queries,
        torch.cat([summary, pad(key, (0, 2))], 2),
        torch.cat([marked, pad(value, (0, 1))], 2),
        attention.mask_for(visible),
    )[0]
    weight = joined[..., -1].to(wide)
    result = joined[..., :-1].to(wide) + weight[..., None] * out.transpose(1, 2)
    return result, weight.transpose(1, 2)
