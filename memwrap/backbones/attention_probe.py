"""What a model's attention is like, learned by running one token through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones.layer_attention import AttentionStep, LayerAttention
from memwrap.backbones.positions import Positions
from memwrap.backbones.rotary import Rotary


@dataclass(frozen=True)
class AttentionSizes:
    """Heads and widths of one layer's attention, and its own sliding window and soft cap if it has
    them."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None


class _Probe:
    """A context that notes what every layer's attention is given, for one token at a position."""

    def __init__(self, position: int, rotary: Rotary) -> None:
        self.position = torch.full((1, 1), position)
        real = torch.ones(1, 1, dtype=torch.bool)
        nothing = self.position[:, :0], real[:, :0]
        positions = Positions.of(nothing, (self.position, real), ~real)
        self._positions, self._rotary = positions, rotary
        self.layers: dict[int, LayerAttention] = {}

    def before_layer(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def after_layer(self, layer: int, hidden: Tensor) -> None:
        return None

    def attention_step(self, device: torch.device) -> AttentionStep:
        return AttentionStep(self._positions, self._rotary)

    def attention(self, attention: LayerAttention) -> Tensor:
        self.layers[attention.layer] = attention
        return attention.local()


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
    first, second = _Probe(0, rotary), _Probe(3, rotary)
    run(first.position, first)
    if len(first.layers) != num_layers:
        raise ValueError(
            f"{name} does not hand keyword arguments down to its attention function, which "
            "memories at the attention place need; use a token-level one (rmt)."
        )
    sizes = {}
    for layer, attention in sorted(first.layers.items()):
        heads, (_, kv_heads, _, width) = (
            attention.rotated_query.shape[1],
            attention.rotated_key.shape,
        )
        value_width = attention.value.shape[-1]
        sizes[layer] = AttentionSizes(
            heads, kv_heads, width, value_width, attention.window, attention.softcap
        )
    if not rotary.present:
        return sizes
    run(second.position, second)
    rotated = {}
    for layer in sizes:
        start, moved = first.layers[layer], second.layers[layer]
        scale = start.rotated_key.abs().max().clamp_min(1e-12)
        error = (moved.key - start.key).abs().max() / scale
        unmoved = (moved.rotated_key - start.rotated_key).abs().max() / scale
        if min(error, unmoved) > 0.03:  # bf16 leaves some 0.01
            raise ValueError(
                f"{name} rotates the keys of layer {layer} in a way that memwrap cannot take back; "
                "use a memory at another place (rmt, armt)."
            )
        rotated[layer] = bool(error < unmoved)
    rotary.rotated = rotated
    return sizes
