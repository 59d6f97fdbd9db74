"""Delayed eviction of keys (DMS, Lancucki et al. 2025): what a decision is worth, and attention
that heeds decisions.

Shapes: B rows, H query heads, G KV heads, T tokens. The decision about a key is made by the token
behind it; nothing is decided about the last one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE, OFFSET = 100.0, 5.0  # of a decision map's output, as published
FORGOTTEN = -1000.0  # added to a score: nothing is left of it


def decision_logits(raw: Tensor, temperature: float, noise: Tensor | None = None) -> Tensor:
    """Compute `(x + noise) / temperature` with `x = SCALE * raw - OFFSET`; above 0 a key goes."""
    x = raw * SCALE - OFFSET
    return (x if noise is None else x + noise) / temperature


def logistic_noise(like: Tensor) -> Tensor:
    """Draw the difference of two Gumbel variables with torch's generator."""
    tiny = torch.finfo(like.dtype).tiny
    drawn = torch.rand_like(like).clamp(tiny, 1 - torch.finfo(like.dtype).eps)
    return drawn.log() - (-drawn).log1p()


def decisions_of(logits: Tensor) -> Tensor:
    """Compute decisions, 1 for a key that goes, with the gradients of their probabilities."""
    share = logits.sigmoid()
    return share + ((share > 0.5).to(share) - share).detach()


def soft_bias(logits: Tensor) -> Tensor:
    """Compute what a key's score gets beyond the window in training."""
    return F.logsigmoid(-logits)


def hard_bias(logits: Tensor) -> Tensor:
    """Compute what a key's score gets beyond the window otherwise: all or nothing."""
    return torch.where(logits > 0, FORGOTTEN, 0.0).to(logits)


def about_keys(made: Tensor, valid: Tensor, pending: float = 0.0) -> tuple[Tensor, Tensor]:
    """Move what tokens decide to the keys that it is about.

    Args:
        made: `(B, G, T)` by the token that decides.
        valid: `(B, T)` bool, False for padding.
        pending: of the last key.

    Returns:
        `(B, G, T)` by key, and `(B, G)` what the first token decides about a key in front of all.
    """
    total = valid.shape[1]
    if not total:
        return made, made.new_full(made.shape[:2], pending)
    column = torch.arange(total, device=valid.device)
    behind = torch.where(valid, column, total).flip(1).cummin(1).values.flip(1)
    following = F.pad(behind[:, 1:], (0, 1), value=total)
    spare = F.pad(made, (0, 1), value=pending)
    keys = spare.gather(2, following[:, None].expand_as(made))
    first = behind[:, :1, None].expand(-1, made.shape[1], 1)
    return keys, spare.gather(2, first)[..., 0]


def dropped_share(logits: Tensor, valid: Tensor) -> Tensor:
    """Compute the share of a row's keys that go, `(B,)`, over all its heads."""
    made = decisions_of(logits) * valid[:, None]
    return made.sum((1, 2)) / (valid.sum(1) * made.shape[1]).clamp_min(1)


def target_share(compression: float) -> float:
    """Compute the share of keys that goes at a compression of 1, 2, 3, ... times."""
    return 1 - 1 / compression


def naive(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, valid: Tensor
) -> Tensor:
    """Attend token by token: the plain statement.

    Args:
        query: `(B, H, T, D)`, rotated.
        key, value: `(B, G, T, D)`.
        bias: `(B, G, T)`, added to the scores of keys that are `window` tokens back or more.
        window: tokens that a query sees whatever was decided, itself among them.
        valid: `(B, T)` bool; False is padding in front.

    Returns:
        `(B, H, T, D)`, zeros at padding.
    """
    groups, out = query.shape[1] // key.shape[1], torch.zeros_like(query)
    for row, real in enumerate(valid.tolist()):
        for head in range(query.shape[1]):
            for now in (n for n, one in enumerate(real) if one):
                seen = [n for n in range(now + 1) if real[n]]
                keys, more = key[row, head // groups, seen], bias[row, head // groups, seen]
                far = torch.tensor([now - n >= window for n in seen])
                scores = keys @ query[row, head, now] * query.shape[-1] ** -0.5
                scores = scores + torch.where(far, more, 0.0)
                read = scores.softmax(0) @ value[row, head // groups, seen]
                out = out.index_put(tuple(torch.tensor(n) for n in (row, head, now)), read)
    return out


def visible_until(decisions: Tensor, window: int) -> Tensor:
    """Compute the first token that no longer sees each key, `(B, G, T)`; T if all in the text do.

    Args:
        decisions: `(B, G, T)` of 0 and 1, made at token t about key t - 1.
        window: as in `naive`.
    """
    total = decisions.shape[2]
    goes = F.pad(decisions[..., 1:], (0, 1)) > 0
    last = torch.arange(total) + window
    return torch.where(goes, last, total).clamp_max(total)
