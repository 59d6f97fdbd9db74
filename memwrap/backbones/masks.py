"""Explicit attention masks from positions: who may see whom, with padding and windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import recurrence
from memwrap.backbones.layer_attention import implementation

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
ATTENDING = (*KINDS, "hybrid")
PLAIN = ("mlp", "moe")  # layers of a feed-forward block alone
_ALLOWED = (*KINDS, *recurrence.KINDS, *PLAIN)


def layer_kinds(config: Any) -> list[str]:
    """List the kinds of a backbone's layers, sorted.

    Raises:
        ValueError: for a kind that an explicit mask cannot express, or layers without attention.
    """
    types = getattr(config, "layer_types", None)
    if types:
        kinds = sorted(set(types))
    else:
        kinds = [KINDS[1] if getattr(config, "sliding_window", None) else KINDS[0]]
    unknown = [kind for kind in kinds if kind not in _ALLOWED]
    if unknown:
        raise ValueError(
            f"The backbone ({config.model_type}) has layers of type {', '.join(unknown)}; memwrap "
            f"reads segments through {', '.join(_ALLOWED)} layers only."
        )
    if not set(kinds) & set(ATTENDING):
        raise ValueError(
            f"The backbone ({config.model_type}) has no attention layers; memwrap needs some."
        )
    return kinds


def recurrent_layers(config: Any) -> list[int]:
    """List the numbers of a backbone's recurrent layers."""
    types = getattr(config, "layer_types", None) or []
    return [number for number, kind in enumerate(types) if kind in recurrence.KINDS]


def layers_without_attention(config: Any) -> list[int]:
    """List the numbers of a backbone's layers that do not attend."""
    types = getattr(config, "layer_types", None) or []
    return [number for number, kind in enumerate(types) if kind not in ATTENDING]


def build_masks(
    config: Any,
    query_positions: Tensor,
    key_positions: Tensor,
    key_valid: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | dict[str, Tensor | None] | None:
    """Build the mask that a backbone takes: one `(B, 1, T, K)` tensor, or one for each kind of
    layer (None for those that do not attend).

    Args:
        config: the backbone's (text) config.
        query_positions: `(B, T)`; the queries are the last T keys.
        key_positions: `(B, K)`.
        key_valid: `(B, K)` bool; False is padding, seen by nobody but itself.
        dtype: dtype of an additive mask.
        device: where the masks are needed.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & key_valid[:, None, :]
    # A padding query sees itself: a row without any key would be NaN.
    length = query_positions.shape[1]
    past = key_positions.shape[1] - length
    visible[:, torch.arange(length), past + torch.arange(length)] = True
    result: dict[str, Tensor | None] = {}
    kinds = layer_kinds(config)
    if "hybrid" in kinds:  # asks for those of its parts
        kinds = sorted({*kinds, "full_attention", "linear_attention"} - {"hybrid"})
    for kind in kinds:
        if kind not in KINDS:  # sees tokens only: `recurrence` leaves padding out
            result[kind] = None
            continue
        mask = visible
        if kind == KINDS[1]:
            mask = visible & (distance < config.sliding_window)
        elif kind == KINDS[2]:
            query, key = (
                p // config.attention_chunk_size for p in (query_positions, key_positions)
            )
            mask = visible & (query[:, :, None] == key[:, None, :])
        mask = mask[:, None].to(device)
        if implementation(config) == "eager":
            zero = torch.zeros((), dtype=dtype, device=device)
            mask = torch.where(mask, zero, torch.finfo(dtype).min)
        result[kind] = mask
    return next(iter(result.values())) if len(result) == 1 else result
