"""What a memory may know of the backbone it is built for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memwrap.backbones.attention_probe import AttentionSizes


@dataclass(frozen=True)
class Sizes:
    """The facts that a memory may know of the backbone it is built for.

    Attributes:
        hidden_size: width D of the hidden states between layers.
        embedding_size: width of input embeddings and of the decoder's last hidden state.
        num_layers: decoder layers.
        embedding_std: standard deviation of the input embedding weights.
        dtype: dtype of the memory's parameters.
        backbone_dtype: dtype of the backbone, in which it keeps keys and values.
        embedding_mean: mean `(D,)` of all ids' embeddings, as the backbone embeds them.
        vocab_size: rows of the input embeddings.
        device: device of the memory's parameters.
        attention: heads and widths of attention by layer, for memories at that place. Recurrent
            layers have none.
    """

    hidden_size: int
    embedding_size: int
    num_layers: int
    embedding_std: float
    dtype: torch.dtype = torch.float32
    backbone_dtype: torch.dtype = torch.float32
    embedding_mean: Tensor | None = None
    vocab_size: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attention: dict[int, AttentionSizes] = field(default_factory=dict)


def chosen_layers(config: Any, sizes: Sizes) -> list[int]:
    """List the layers that `config.layers` names; all of them for None.

    Raises:
        ValueError: for a layer that the backbone does not have.
    """
    if config.layers is None:
        return list(range(sizes.num_layers))
    if max(config.layers) >= sizes.num_layers:
        raise ValueError(
            f"{type(config).__name__}.layers names layer {max(config.layers)}; the backbone has "
            f"layers 0 to {sizes.num_layers - 1}."
        )
    return sorted(config.layers)


def late_layers(sizes: Sizes) -> list[int]:
    """List every second layer of the last fifth (24, 26, 28 of 30; 3 of 4), where a trained
    memory on a pretrained model carried most for its cost."""
    first = min(4 * sizes.num_layers // 5, sizes.num_layers - 1)
    return list(range(first, sizes.num_layers, 2))


def attending_layers(config: Any, sizes: Sizes) -> list[int]:
    """List the layers that `config.layers` names; for None all that have attention.

    Raises:
        ValueError: for a layer that the backbone does not have, or that has no attention.
    """
    if config.layers is None:
        return list(sizes.attention)
    layers = chosen_layers(config, sizes)
    check_attention(config, "layers", layers, sizes)
    return layers


def check_attention(config: Any, name: str, layers: Collection[int], sizes: Sizes) -> None:
    """Refuse layers, given in the field `name`, that have no attention.

    Raises:
        ValueError: names them, and those that have.
    """
    without = sorted(set(layers) - set(sizes.attention))
    if without:
        raise ValueError(
            f"{type(config).__name__}.{name} names layers without attention, {without}; the "
            f"backbone has some in {sorted(sizes.attention)}."
        )


def three_quarters(sizes: Sizes) -> int:
    """Choose the first layer with attention from three quarters of the depth on (else the last),
    where methods with one memory layer have it."""
    late = [layer for layer in sizes.attention if layer >= 3 * sizes.num_layers // 4]
    return late[0] if late else max(sizes.attention)


def memory_tokens(count: int, sizes: Sizes) -> nn.Parameter:
    """Draw learned tokens `(count, D)` at the scale of the input embeddings."""
    tokens = torch.empty(count, sizes.embedding_size, dtype=sizes.dtype, device=sizes.device)
    scale = sizes.embedding_std if math.isfinite(sizes.embedding_std) else 0.02
    return nn.Parameter(nn.init.normal_(tokens, std=scale or 0.02))
