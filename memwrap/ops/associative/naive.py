"""The associative memory of ARMT in plain loops: the specification (`memwrap.ops.associative`)."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.associative.chunked import EPS


def read_naive(q: Tensor, A: Tensor, z: Tensor | None) -> Tensor:
    out = torch.zeros(*q.shape[:-1], A.shape[-1], dtype=A.dtype, device=A.device)
    rows = []
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            tokens = []
            for t in range(q.shape[2]):
                value = (q[b, h, t, :, None] * A[b, h]).sum(0)
                if z is not None:
                    value = value / ((q[b, h, t] * z[b, h]).sum() + EPS)
                tokens.append(value)
            heads.append(torch.stack(tokens) if tokens else out[b, h])
        rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else out


def write_naive(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    z: Tensor | None,
    written: Tensor,
    correction: bool,
    key_eps: float,
) -> tuple[Tensor, Tensor | None]:
    beta = beta.expand_as(v)
    new_A, new_z = A.clone(), None if z is None else z.clone()
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            for i in range(k.shape[2]):
                key, previous, gamma = k[b, h, i], torch.zeros_like(v[b, h, i]), 1.0
                if written[b]:
                    previous = (key[:, None] * A[b, h]).sum(0)
                    if z is not None:
                        denominator = (key * z[b, h]).sum() + EPS
                        previous = previous / denominator
                        squared = float((key * key).sum().detach()) + key_eps
                        if correction:
                            ratio = float(denominator.detach()) / squared if squared > 0 else 1.0
                            gamma = min(max(1 - ratio, 0.0), 1.0)
                change = torch.outer(key, beta[b, h, i] * (v[b, h, i] - previous))
                new_A = new_A.index_put((torch.tensor(b), torch.tensor(h)), new_A[b, h] + change)
                if new_z is not None:
                    new_z = new_z.index_put(
                        (torch.tensor(b), torch.tensor(h)), new_z[b, h] + gamma * key
                    )
    return new_A, new_z
