"""The block memory of InfLLM in plain loops: the specification (`memwrap.ops.infllm`)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype


def gather_naive(
    query: Tensor, starts: Tensor, valid: Tensor, total: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = query.shape
    means = query.new_zeros(batch, int(starts.sum(1).max()) if length else 0, heads, width)
    total, count = total.clone(), count.clone()
    for row in range(batch):
        made = 0
        for t in range(length):
            if valid[row, t]:
                total[row] += query[row, :, t]
                count[row] += 1
            if starts[row, t]:
                means[row, made] = total[row] / count[row]
                made += 1
                total[row], count[row] = 0, 0
    return means, total, count


def select_naive(scores: Tensor, units: Tensor, top_k: int) -> Tensor:
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, count in enumerate(units.tolist()):
        for index in range(scores.shape[1]):
            values = scores[row, index, :count].tolist()
            best = sorted(range(count), key=lambda n: (-values[n], -n))[:top_k]
            chosen[row, index, best] = True
    return chosen


def representatives_naive(keys: Tensor, scores: Tensor, count: int) -> Tensor:
    groups = scores.shape[2] // keys.shape[2]
    result = keys.new_zeros(*scores.shape[:3], keys.shape[-1])
    for row, unit, head in itertools.product(*(range(n) for n in scores.shape[:3])):
        values = scores[row, unit, head].tolist()
        best = sorted(range(len(values)), key=lambda n: -values[n])[:count]
        result[row, unit, head] = keys[row, unit, head // groups, best].mean(0)
    return result


def received_naive(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    groups, wide = query.shape[1] // key.shape[1], accumulation_dtype(query)
    result = query.new_zeros(*query.shape[:2], key.shape[2], dtype=wide)
    for t in range(query.shape[2]):
        for head in range(query.shape[1]):
            own_key, own_query = key[:, head // groups], query[:, head, t, None]
            products = (own_key.to(wide) * own_query.to(wide)).sum(-1)
            result[:, head] += products * visible[:, t]
    return result
