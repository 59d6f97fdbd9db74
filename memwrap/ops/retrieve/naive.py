"""Retrieval attention in plain loops: the specification (`memwrap.ops.retrieve`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def search_naive(
    query: Tensor, keys: Tensor, valid: Tensor, top_k: int, similarity: str
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    group, count = heads // keys.shape[1], keys.shape[2]
    shape = (batch, heads, length, min(top_k, count))
    best = query.new_full(shape, -math.inf)
    index = torch.full(shape, -1, dtype=torch.long, device=query.device)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                ranking = []
                for n in range(count):
                    q, k = query[b, h, t], keys[b, h // group, n].to(query.dtype)
                    score = float(q @ k)
                    if similarity == "cosine":
                        score /= max(float(q.norm()) * float(k.norm()), 1e-12)
                    elif similarity == "l2":
                        score = 2 * score - float(k @ k)
                    if bool(valid[b, n]):
                        ranking.append((-score, n))
                for place, (score, n) in enumerate(sorted(ranking)[:top_k]):
                    best[b, h, t, place], index[b, h, t, place] = -score, n
    return best, index


def attend_naive(
    query: Tensor, keys: Tensor, values: Tensor, index: Tensor, scales: Tensor, cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, top = index.shape
    group, wide = heads // keys.shape[1], scales.dtype
    outs, totals, weights = [], [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                chosen = [n for n in index[b, h, t].tolist() if n >= 0]
                row_weights = torch.zeros(top, dtype=wide, device=query.device)
                out = torch.zeros(values.shape[-1], dtype=wide, device=query.device)
                total = torch.full((), -math.inf, dtype=wide, device=query.device)
                if chosen:
                    rows = keys[b, h // group, chosen].to(wide)
                    scores = rows @ query[b, h, t].to(wide) * scales[h]
                    if cap is not None:
                        scores = cap * torch.tanh(scores / cap)
                    total = scores.exp().sum().log()
                    part = (scores - total).exp()
                    out = part @ values[b, h // group, chosen].to(wide)
                    places = (index[b, h, t] >= 0).nonzero().squeeze(1)
                    row_weights = row_weights.index_put((places,), part)
                outs.append(out)
                totals.append(total)
                weights.append(row_weights)
    shape = (batch, heads, length)
    out, total = torch.stack(outs).view(*shape, -1), torch.stack(totals).view(shape)
    return out, total, torch.stack(weights).view(*shape, top)
