"""What a model's attention is like, learned by running one token through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones.layer_attention import SeenAttention
from memwrap.backbones.rotary import Rotary, unrotate


@dataclass(frozen=True)
class AttentionSizes:
    """Heads and widths of one layer's attention, and its own sliding window if it has one."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


class _Probe:
    """Notes what every layer's attention is given."""

    def __init__(self) -> None:
        self.seen: dict[int, SeenAttention] = {}

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        return None

    def attention(self, seen: SeenAttention) -> Tensor:
        self.seen[seen.layer] = seen
        return seen.call(seen.query, seen.key, seen.value, seen.mask)[0]


def probe(
    run: Callable[[Tensor, Any], Any], num_layers: int, rotary: Rotary, name: str
) -> dict[int, AttentionSizes]:
    """Learn heads and widths of every layer with attention, and whether it rotates, from one token.

    The attention of a single token is its value wherever it stands, so between two positions
    only the rotation may differ: what is un-rotated must agree.

    Args:
        run: runs the decoder on one token at a position `(1, 1)`, with a context.
        num_layers: decoder layers with attention.
        rotary: its `rotated` is filled.
        name: of the model, for errors.

    Raises:
        ValueError: if keywords do not reach the attention function, or the rotation is not one
            that can be taken back.
    """
    first, second = _Probe(), _Probe()
    run(torch.zeros(1, 1, dtype=torch.long), first)
    if len(first.seen) != num_layers:
        raise ValueError(
            f"{name} does not hand keyword arguments down to its attention function, which "
            "memories at the attention place need; use a token-level one (rmt)."
        )
    sizes = {
        layer: AttentionSizes(
            s.query.shape[1], s.key.shape[1], s.key.shape[-1], s.value.shape[-1], s.window
        )
        for layer, s in sorted(first.seen.items())
    }
    if not rotary.present:
        return sizes
    place = torch.full((1, 1), 3)
    run(place, second)
    rotated = {}
    for layer in sizes:
        start, moved = first.seen[layer].key, second.seen[layer].key
        plain = unrotate(start, rotary.angles(torch.zeros_like(place), layer, start))
        turned = unrotate(moved, rotary.angles(place, layer, moved))
        scale = start.abs().max().clamp_min(1e-12)
        error, still = ((a - b).abs().max() / scale for a, b in ((turned, plain), (moved, start)))
        if min(error, still) > 0.03:  # bf16 leaves some 0.01
            raise ValueError(
                f"{name} rotates the keys of layer {layer} in a way that memwrap cannot take back; "
                "use a memory at another place (rmt, armt)."
            )
        rotated[layer] = bool(error < still)
    rotary.rotated = rotated
    return sizes
