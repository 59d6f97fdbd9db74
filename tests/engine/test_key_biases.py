"""Biases and positions by KV head of what stands before a segment, against a mask that is added."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import crossed
from torch import Tensor

import memwrap
from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.backbones.key_biases import add_bias
from memwrap.memories.window import WindowMemory
from memwrap.testing.families import FAMILIES, build
from memwrap.testing.helpers import assert_close, error_of, ids

ENTRIES = 5


def entries_of(attention: LayerAttention) -> MemoryKeyValues:
    """Random ones; the last is not there for the first KV head, and the first for nobody."""
    draw = torch.Generator().manual_seed(attention.layer)
    batch, heads, _, width = attention.rotated_key.shape
    dtype = attention.rotated_key.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    keys = normal(batch, heads, ENTRIES, width)
    bias = torch.randn(batch, heads, ENTRIES, generator=draw, dtype=torch.float64) * 2
    keys[:, 0, -1], bias[:, 0, -1] = 0.0, -math.inf
    places = -torch.randint(1, 40, (batch, heads, ENTRIES), generator=draw).float()
    visible = torch.arange(ENTRIES).expand(batch, -1) > 0
    values = normal(batch, heads, ENTRIES, attention.value.shape[-1])
    return MemoryKeyValues(keys, values, places, visible, bias=bias)


def by_a_mask(attention: LayerAttention, memory: MemoryKeyValues) -> Tensor:
    """The same by one rotation a head, and a mask for every query head."""
    rotated = [
        attention.rotate(memory.keys[:, h : h + 1], memory.positions[:, h])
        for h in range(memory.keys.shape[1])
    ]
    keys = torch.cat([torch.cat(rotated, 1), attention.rotated_key], 2)
    values = torch.cat([memory.values, attention.value], 2)
    inside = attention.visible()
    visible = memory.visible[:, None, None].expand(-1, 1, inside.shape[2], -1)
    visible = torch.cat([visible, inside], -1)
    bias: Tensor = memory.bias.repeat_interleave(attention.groups, 1)  # type: ignore[union-attr]
    bias = torch.nn.functional.pad(bias, (0, inside.shape[-1]))[:, :, None]
    low = torch.finfo(keys.dtype).min
    mask = torch.where(visible, bias.clamp_min(low), low).to(keys.dtype)
    return attention.function(attention.rotated_query, keys, values, mask)[0]


@pytest.mark.parametrize(("family", "implementation"), crossed(FAMILIES, ["sdpa", "eager"], 1))
def test_joined_with_biases(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact in float64: grouped heads, scaled queries, soft caps, layers that do not rotate."""
    if family in ("gemma2", "gpt_oss") and implementation == "sdpa":
        implementation = "eager"  # transformers refuses soft caps and learned sinks in sdpa
    met, wide = [], torch.float64

    def attend(self: Any, layer: int, attention: LayerAttention, state: Any) -> Any:
        met.append(layer)
        memory = entries_of(attention)
        got = attention.join(memory)[0]
        assert_close(got, by_a_mask(attention, memory), 1e-12 if got.dtype == wide else 1e-5)
        plain = MemoryKeyValues(memory.keys, memory.values, memory.positions, memory.visible)
        assert error_of(attention.join(plain)[0], got) > 1e-3  # the biases matter
        again = attention.join(memory, weights=True)
        assert again[1] is not None and again[1].shape[-1] == ENTRIES + got.shape[1]
        assert_close(again[0], got, 1e-5)  # eager softmax is float32
        return got, state

    monkeypatch.setattr(WindowMemory, "attend", attend)
    base = build(family, attention=implementation)
    if family not in ("qwen3_next", "gpt_oss", "deepseek_v2"):  # experts do not run in float64
        base = base.to(wide)
    model = memwrap.wrap(base, "window", segment_size=8, window_size=12)
    with torch.no_grad():
        model(ids(2, 6))
    assert met


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_hold_a_bias_finely(dtype: torch.dtype) -> None:
    """Two channels hold what one rounds by up to 0.008, and nothing overflows."""
    bias = torch.linspace(-3, 3, 7).expand(1, 2, 7).clone()
    bias[..., -1] = -1000.0
    queries, keys = torch.zeros(1, 4, 3, 8, dtype=dtype), torch.zeros(1, 2, 7, 8, dtype=dtype)
    for scaling in (8**-0.5, 1.0, 1 / 64):
        mask = torch.ones(1, 1, 3, 7, dtype=torch.bool)
        q, k, same = add_bias(queries, keys, mask, bias, scaling, None)
        assert same is mask
        scores = q[:, :2].float() @ k.float().transpose(-1, -2) * scaling
        assert (scores - bias[:, :, None])[..., :-1].abs().max() < 1e-3 / 8
        assert bool((scores[..., -1] < -400).all())
