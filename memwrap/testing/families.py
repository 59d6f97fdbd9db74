"""Tiny random causal LMs of every family the tests meet, built in memory.

Weights are six times as large as transformers would draw them (embeddings 18 times), so that
logits are not flat and greedy answers do not repeat one token; one-dimensional parameters
(norms, biases) are random too, so that every one matters. Where a family knows sliding
windows, the window is smaller than the tests' segments of 8 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    SmolLM3Config,
)

from memwrap.backbones.recurrence import SUPPORTED

VOCABULARY = 128
WINDOW = 5

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]
# Tiny memories that name their layers name the first two.
_RECURRENT = {
    "num_hidden_layers": 3, "head_dim": 8, "tie_word_embeddings": False,
    "layer_types": ["full_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}  # fmt: skip


def _with(config: type[PreTrainedConfig], **settings: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: config(**{**_COMMON, **settings})


def _gpt_neox() -> PreTrainedConfig:
    values = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
    return GPTNeoXConfig(**values, hidden_dropout=0.0, attention_dropout=0.0)


def _gpt2() -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def _opt() -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _with(LlamaConfig),
    "mistral": _with(MistralConfig, sliding_window=WINDOW, head_dim=8),
    "qwen2": _with(Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, layer_types=_MIXED),
    "qwen3": _with(
        Qwen3Config, head_dim=8, use_sliding_window=True, sliding_window=WINDOW, layer_types=_MIXED
    ),
    "gemma2": _with(
        Gemma2Config, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
        layer_types=_MIXED, tie_word_embeddings=False,
    ),
    "gemma3": _with(
        Gemma3TextConfig, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW,
        layer_types=_MIXED, tie_word_embeddings=False,
    ),
    "phi3": _with(Phi3Config, sliding_window=WINDOW),
    "olmo2": _with(Olmo2Config),
    "granite": _with(
        GraniteConfig, embedding_multiplier=2.0, residual_multiplier=0.7, logits_scaling=0.5,
        attention_multiplier=0.3,
    ),
    "smollm3": _with(
        SmolLM3Config, use_sliding_window=True, sliding_window=WINDOW, layer_types=_MIXED,
        no_rope_layers=[1, 0], tie_word_embeddings=False,
    ),
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "opt": _opt,
    # Cosines and sines of half a head's width, a score more in every softmax.
    "gpt_oss": _with(
        GptOssConfig, head_dim=8, sliding_window=WINDOW, layer_types=_MIXED, num_local_experts=4,
        num_experts_per_tok=2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # Complex angles, which turn the last channels; values of another width than keys.
    "deepseek_v2": _with(
        DeepseekV2Config, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6, first_k_dense_replace=1,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
        topk_group=1, n_shared_experts=1,
    ),
}  # fmt: skip
# With recurrent layers of their own.
RECURRENT: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_next": _with(
        Qwen3NextConfig, **_RECURRENT, **_DELTA, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "qwen3_5": _with(Qwen3_5TextConfig, **_RECURRENT, **_DELTA),
    "lfm2": _with(
        Lfm2Config, **{**_RECURRENT, "layer_types": ["full_attention", "full_attention", "conv"]},
        conv_L_cache=3, block_auto_adjust_ff_dim=False,
    ),
}  # fmt: skip
if SUPPORTED:  # by the installed transformers; otherwise they are refused (tests/integration)
    CONFIGS |= RECURRENT
FAMILIES = tuple(CONFIGS)


def build(family: str, *, seed: int = 0, attention: str | None = None, **changes: Any) -> Any:
    """A tiny causal LM in evaluation mode; the same seed gives the same weights.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights.
        attention: `attn_implementation`; by default what transformers chooses.
        changes: attributes of the config set after it was made.
    """
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(6)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.get_input_embeddings().weight.mul_(3)
    return model.eval()
