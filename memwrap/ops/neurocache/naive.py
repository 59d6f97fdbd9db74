"""Neurocache's attention in plain loops: the specification (`memwrap.ops.neurocache`)."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_naive(
    query: Tensor, states: Tensor, valid: Tensor, column: Tensor, present: Tensor,
    key_weight: Tensor, value_weight: Tensor, layout: str,
) -> Tensor:  # fmt: skip
    batch, length, heads, width = query.shape
    groups, count = key_weight.shape[0], states.shape[2]
    out = []
    for b in range(batch):
        for t in range(length):
            for head in range(heads):
                group = head // (heads // groups)
                keys, values = [], []
                for place in range(column.shape[2]):
                    source = int(column[b, t, place])
                    for chunk in range(count):
                        state, weight = chunk, group
                        if layout == "published":
                            state, weight = divmod(group * count + chunk, groups)
                        if bool(present[b, t, place]) and bool(valid[b, source, state]):
                            row = states[b, source, state]
                            keys.append(key_weight[weight] @ row)
                            values.append(value_weight[weight] @ row)
                if not keys:
                    out.append(query.new_zeros(width))
                    continue
                weights = (torch.stack(keys) @ query[b, t, head]).softmax(0)
                out.append(weights @ torch.stack(values))
    return torch.stack(out).view(batch, length, heads, -1)
