"""How many slots each head gets: shares under a cap, or one ranking of all heads' keys."""

from __future__ import annotations

import torch
from torch import Tensor


def capped_shares(shares: Tensor, most: float) -> Tensor:
    """Cap shares at `most`; what is cut off goes to the others in proportion to theirs.

    Args:
        shares: any shape, none negative.
        most: of one share. Where all are capped, the rest is given to nobody.
    """
    shares, total = shares.double().clone(), float(shares.sum())
    capped = torch.zeros_like(shares, dtype=torch.bool)
    while bool((over := ~capped & (shares > most)).any()):
        capped |= over
        shares[capped] = most
        free = float(shares[~capped].sum())
        if free > 0:
            shares[~capped] *= max(total - most * int(capped.sum()), 0.0) / free
    return shares


def slots_of_shares(shares: Tensor, slots: int, tokens: int, most: float = 0.75) -> Tensor:
    """Turn the heads' shares of all slots into numbers of slots.

    Args:
        shares: `(L, Hkv)`, sum 1.
        slots: of a head on average.
        tokens: that are compacted.
        most: a head keeps at most this part of them.
    """
    total = slots * shares.numel()
    return (capped_shares(shares, most * tokens / total) * total).floor().long()


def best_of_all(scores: Tensor, count: int) -> Tensor:
    """Choose the `count` largest of all scores `(..., T)` together: bool of that shape; of equal
    ones the first."""
    order = scores.flatten().argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order] = True
    return chosen.view(scores.shape)
