"""One attention layer: of a model that adds nothing to it, or read by a memory itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from memwrap.backbones import LayerAttention, Positions
from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.backbones.layer_attention import AttentionCall, AttentionStep
from memwrap.backbones.rotary import Embeddings, LayerRotation, Rotary, Rotation, rotate
from memwrap.memories.config import MemoryConfig
from memwrap.memories.registry import memory_class
from memwrap.memories.sizes import Sizes
from memwrap.testing.families import build


def bare_attention() -> tuple[Any, Any]:
    """A model whose logits are its input plus the attention's heads, side by side, and the
    attention (4 heads and 2 KV heads of 8 channels)."""
    base = build("llama")
    base.model.layers = base.model.layers[:1]
    base.config.num_hidden_layers = 1
    layer = base.model.layers[0]
    layer.input_layernorm = base.model.norm = nn.Identity()
    base.lm_head = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.eye_(base.lm_head.weight)
        nn.init.eye_(layer.self_attn.o_proj.weight)
    return base, layer.self_attn


def rotated_by_hand(x: Tensor, theta: float, positions: Tensor | None = None) -> Tensor:
    """`(B, H, T, D)` under RoPE over half-split channels, at positions `(T,)` or `(B, 1, T)`, from
    0 by default."""
    half = x.shape[-1] // 2
    frequency = theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    positions = torch.arange(x.shape[-2]) if positions is None else positions
    angle = positions[..., None] * frequency
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def scaled_rope(theta: float, distance_scale: float = 1.0) -> dict[str, Any]:
    """Rope parameters whose angles are those of `distance_scale` times the position."""
    if distance_scale == 1:
        return {"rope_type": "default", "rope_theta": float(theta)}
    return {"rope_type": "linear", "rope_theta": float(theta), "factor": 1 / distance_scale}


class OneLayer:
    """A memory at the attention place, given un-rotated queries, keys and values.

    Attributes:
        memory, state: the memory and its tree for the layer.
    """

    def __init__(
        self, config: MemoryConfig, heads: int, kv_heads: int, width: int, rows: int = 1,
        base: float = 10000.0, dtype: torch.dtype = torch.float32, distance_scale: float = 1.0,
    ) -> None:  # fmt: skip
        rope = scaled_rope(base, distance_scale)
        llama = LlamaConfig(
            hidden_size=heads * width, num_attention_heads=heads, head_dim=width,
            rope_parameters=rope,
        )  # fmt: skip
        embeddings = Embeddings("", LlamaRotaryEmbedding(llama), packed=False, swapped=False)
        self.rotary = Rotary({0: LayerRotation(embeddings, Rotation.halves(width))})
        self.module = SimpleNamespace(
            layer_idx=0, training=False, config=SimpleNamespace(_attn_implementation="eager"),
            num_key_value_groups=heads // kv_heads, scaling=width**-0.5,
        )  # fmt: skip
        sizes = Sizes(
            hidden_size=1, embedding_size=1, num_layers=1, embedding_std=1.0, dtype=dtype,
            backbone_dtype=dtype, attention={0: AttentionSizes(heads, kv_heads, width, width)},
        )  # fmt: skip
        self.memory = memory_class(config.name)(config, sizes)
        self.state = self.memory.init_state(rows, torch.device("cpu"))["layers"]["0"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """Read a whole segment `(B, H, T, D)`, leaving it open: `(B, H, T, D)`; `valid` `(B, T)`
        is false at padding in front."""
        batch, _, count, _ = q.shape
        valid = torch.ones(batch, count, dtype=torch.bool) if valid is None else valid
        where = (valid.long().cumsum(1) - 1).clamp_min(0)
        angles = self.rotary.angles(where, 0, q)
        nothing = where[:, :0], valid[:, :0]
        positions = Positions.of(nothing, (where, valid), torch.zeros_like(valid))
        context: Any = None
        module: Any = self.module

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            # As transformers' eager attention, whose softmax is float32 in any case.
            k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
            scores = q @ k.transpose(2, 3) * module.scaling
            weights = (scores if mask is None else scores + mask).softmax(-1)
            return (weights @ v).transpose(1, 2).contiguous(), weights

        hidden = torch.ones(count, count, dtype=torch.bool).triu(1) | ~valid[:, None]
        hidden &= ~torch.eye(count, dtype=torch.bool)
        mask = torch.zeros(hidden.shape, dtype=q.dtype)
        mask = mask.masked_fill(hidden, torch.finfo(q.dtype).min)[:, None]
        self.attention = LayerAttention(
            module, AttentionCall(module, context, q), AttentionStep(positions, self.rotary),
            rotate(q, angles), rotate(k, angles), v, mask,
            module.scaling, call, call,
        )  # fmt: skip
        out, self.state = self.memory.attend(0, self.attention, self.state)
        return out.transpose(1, 2)

    def close(self) -> None:
        """Close the segment that was read."""
        self.state = self.memory.write_attention(0, self.attention, self.state)
