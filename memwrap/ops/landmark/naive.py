"""The grouped softmax of landmark attention in plain loops: the specification.

`memwrap.ops.landmark` says what shapes and arguments mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype


def grouped_softmax(
    scores: Tensor, landmark: Tensor, visible: Tensor, current: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention weights where landmarks stand anywhere.

    A landmark belongs to the section that it closes. The landmark of a query's own section has no
    weight. A landmark whose section has no visible token keeps its share, which is lost, as
    published; `attention` and `retrieved` leave such a section out.

    Args:
        scores: `(B, H, T, K)`.
        landmark: `(B, K)` bool, keys that are landmarks.
        visible: `(B, T, K)` bool.
        current: `(B, T)`, the queries' own sections; default: that of the last key they see.

    Returns:
        Weights `(B, H, T, K)`, and the log of their common denominator `(B, H, T)` (the smallest
        number for a query that sees nothing, whose weights are 0).
    """
    section = landmark.long().cumsum(1) - landmark.long()
    weights, logs = [], []
    for b in range(scores.shape[0]):
        for t in range(scores.shape[2]):
            seen = visible[b, t].nonzero().flatten().tolist()
            own_section = max((int(section[b, j]) for j in seen), default=0)
            own_section = own_section if current is None else int(current[b, t])
            p, log = _one(scores[b, :, t], landmark[b], seen, section[b], own_section)
            weights.append(p)
            logs.append(log)
    shape = (scores.shape[0], scores.shape[2])
    p, log = (torch.stack(part).unflatten(0, shape) for part in (weights, logs))
    return p.transpose(1, 2), log.transpose(1, 2)


def _one(
    x: Tensor, landmark: Tensor, seen: list[int], section: Tensor, current: int
) -> tuple[Tensor, Tensor]:
    """Compute the weights `(H, K)` of one query."""
    tokens = [j for j in seen if section[j] == current and not landmark[j]]
    gates = [j for j in seen if section[j] < current and landmark[j]]
    p = torch.zeros_like(x)
    if not tokens + gates:
        return p, x.new_full((len(x),), torch.finfo(x.dtype).min)
    shares = x[:, tokens + gates].softmax(-1)
    place = torch.tensor(tokens, dtype=torch.long, device=x.device)
    p = p.index_add(1, place, shares[:, : len(tokens)])
    for index, gate in enumerate(gates):
        members = [j for j in seen if section[j] == section[gate] and not landmark[j]]
        if members:
            share = shares[:, len(tokens) + index, None] * x[:, members].softmax(-1)
            p = p.index_add(1, torch.tensor(members, device=x.device), share)
    return p, x[:, tokens + gates].logsumexp(-1)


def attention_naive(
    q: Tensor, k: Tensor, v: Tensor, m: int, scaling: float, places: Tensor, landmark: Tensor,
    valid: Tensor | None, documents: Tensor | None, softcap: float | None, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `attention`, from all scores at once."""
    x = scores(q, k, scaling, softcap)
    index = torch.arange(k.shape[2], device=q.device)
    section = index // (m + 1)
    last = places - landmark.long()
    visible = index <= last[..., None]
    own_section = section == (places // (m + 1))[..., None]
    if window is not None:
        visible = visible & (~own_section | (index > places[..., None] - window))
    marks = (index % (m + 1) == m).expand(len(q), -1)
    if valid is not None:
        # A block of nothing but padding has no share, whatever its landmark is.
        tokens = valid & ~marks
        empty = torch.stack([~tokens[:, section == s].any(1) for s in section], 1)
        visible = visible & (valid & ~(marks & empty))[:, None]
    if documents is not None:
        query_documents = documents.gather(1, places // (m + 1))
        visible = visible & (documents[:, section][:, None] == query_documents[..., None])
    weights, log = grouped_softmax(x, marks, visible, places // (m + 1))
    kv = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    return (weights @ v[:, kv].to(weights.dtype)).to(v.dtype), log


def scores(q: Tensor, k: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Compute the scores `(B, H, T, K)`."""
    kv = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    wide = accumulation_dtype(q)
    x = (q.to(wide) @ k[:, kv].to(wide).transpose(-1, -2)) * scaling
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def retrieved_naive(
    q: Tensor, keys: Tensor, values: Tensor, landmarks: Tensor, valid: Tensor, ids: Tensor,
    scaling: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `retrieved`, query by query."""
    batch, heads, length = q.shape[:3]
    group, size = heads // landmarks.shape[1], landmarks.shape[2]
    out, logs = [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                row = ids[b, h, t if ids.shape[2] > 1 else 0].tolist()
                parts, gates = [], []
                for r, block in enumerate(row):
                    if block >= size or not valid[b, block].any():
                        continue
                    filled = valid[b, block].nonzero().flatten()
                    one = q[b, h, t, r][None, None, None]
                    key = keys[b, h // group, block][filled.to(keys.device)].to(q.device)
                    value = values[b, h // group, block][filled.to(values.device)].to(q.device)
                    x = scores(one, key[None, None], scaling, softcap)[0, 0, 0]
                    mark = landmarks[b, h // group, block][None, None, None]
                    gates.append(scores(one, mark, scaling, softcap)[0, 0, 0, 0])
                    parts.append(x.softmax(-1) @ value.to(x.dtype))
                if not parts:
                    wide = accumulation_dtype(q)
                    out.append(values.new_zeros(values.shape[-1]).to(q.device, wide))
                    logs.append(torch.full((), torch.finfo(wide).min, dtype=wide, device=q.device))
                    continue
                gate = torch.stack(gates)
                out.append(gate.softmax(0) @ torch.stack(parts))
                logs.append(gate.logsumexp(0))
    shape = (batch, heads, length)
    return torch.stack(out).unflatten(0, shape).to(values.dtype), torch.stack(logs).unflatten(
        0, shape
    )
