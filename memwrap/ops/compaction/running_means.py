"""Slots that are running means of like keys (CAMELoT): a slot of c tokens has the bias log c.

He et al., "CAMELoT: Towards Large Language Models with Training-Free Consolidated Associative
Memory" (2024). A token joins the slot whose key is most like its own, or takes the slot that was
not used for longest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

Slots = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def running_means(
    slots: Slots, new: tuple[Tensor, Tensor, Tensor], valid: Tensor, least: float
) -> Slots:
    """Write tokens into slots, one after the other.

    Args:
        slots: keys `(B, Hkv, S, D)`, values `(B, Hkv, S, Dv)`, places, counts and ages, each
            `(B, Hkv, S)`; a count of 0 is an empty slot.
        new: keys `(B, Hkv, T, D)`, values `(B, Hkv, T, Dv)` and places `(B, T)` of the tokens.
        valid: `(B, T)` bool, which of them there are.
        least: cosine from which on a token joins a slot.

    Returns:
        The slots after it, in float32 or float64.
    """
    wide = torch.promote_types(slots[0].dtype, torch.float32)
    key, value, place, count, age = (x.to(wide) for x in slots)
    keys, values, places = (x.to(wide) for x in new)
    for t in range(keys.shape[2]):
        k, v = keys[:, :, t, None], values[:, :, t, None]
        like = cosine_similarity(key, k, dim=-1).masked_fill(count == 0, -2.0)
        best, nearest = like.max(-1)
        free = torch.where(count == 0, torch.inf, age).argmax(-1)  # an empty one first
        joins = best >= least
        at = torch.where(joins, nearest, free)
        chosen = torch.nn.functional.one_hot(at, key.shape[2]).bool() & valid[:, None, None, t]
        before = torch.where(joins[..., None], count, 0.0)
        share = (1 / (before + 1))[..., None]
        chosen_rows = chosen[..., None]
        key = torch.where(chosen_rows, key + (k - key) * share, key)
        value = torch.where(chosen_rows, value + (v - value) * share, value)
        moved = place + (places[:, None, t, None] - place) * share[..., 0]
        place = torch.where(chosen, moved, place)
        count = torch.where(chosen, before + 1, count)
        older = torch.where(chosen, 0.0, age + 1)
        age = torch.where(valid[:, None, None, t], older, age)
    return key, value, place, count, age
