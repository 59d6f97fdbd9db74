"""Small random models of any architecture, made of its config alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from memwrap.backbones.auto_classes import auto_class
from memwrap.backbones.masks import ATTENDING

VOCABULARY = 256
_MOST_NUMBERS = 2**27  # of a model that is built only to be tried
_WINDOW = 5
# Widths and counts by what configs call them. Names that a config lacks are left out.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("hidden_dim", "out_hidden_size", "projection_dim", "output_dim"), 64),
    **dict.fromkeys(("embed_dim", "emb_dim", "dim", "embedding_size", "text_hidden_size"), 64),
    "embedding_dim": 64,
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 64),
    "encoder_hash_byte_group_vocab": 512,
    **dict.fromkeys(("dim_model", "lm_hidden_size", "vision_hidden_size", "input_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size", "ff_dim"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "d_kv", "kv_channels", "global_head_dim"), 16),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "attention_head_dim", "dim_head"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "o_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_moe_experts", "index_n_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("top_k_experts", "moe_top_k", "index_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "o_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_attention_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_dt_rank"), 8),
    "mamba_d_ssm": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "lru_width": 64,
    "query_pre_attn_scalar": 16, "conv_L_cache": 3, "encoder_layers": 2, "depth": 2,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "attention_chunk_size"), 8),
    "max_window_layers": 1, "max_position_embeddings": 128, "n_positions": 128,
    "rotary_dim": 8, "compress_ratio": 4, "num_nextn_predict_layers": 0, "adapter_len": 2,
}  # fmt: skip
_TOWER = "test_byobnet"  # timm's smallest, in place of what a config names as its `architecture`
# Of towers that must keep the widths on which others depend: what alone makes them small.
_SHALLOW = {"base_channels": 32, "depth": 2}
_WINDOWS = ("sliding_window", "attention_window", "window_size")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def small_model(config: PreTrainedConfig, seed: int = 0, auto: Any = None) -> PreTrainedModel:
    """Build a random model of the config's architecture with two layers (and one of every kind that
    does not attend), narrow if it can be; where none reads ids alone, one that `wrap` refuses.

    Args:
        config: of a model of any size.
        seed: of its weights.
        auto: the class that builds it; default the one that knows the config.

    Raises:
        ValueError: if none can be built; says what the architecture complained of.
    """
    problem, build = "", auto or auto_class(config)
    wide = {key: 512 if value == 64 else value for key, value in _SMALL.items()} | {"head_dim": 128}
    ways: list[tuple[dict[str, Any], str, bool]] = [
        (_SMALL, "all", False), (_SMALL, "text", False), (_SMALL, "", False),
        (wide, "all", False), (wide, "text", False), (_SMALL, "all", True), ({}, "all", False),
    ]  # fmt: skip
    for reads, (widths, cut, towers) in itertools.product((True, False), ways):
        try:  # ever less reduced: not every architecture can be narrowed
            return _build(reduced(config, widths, cut=cut, towers=towers), seed, build, reads)
        except Exception as error:  # whatever a foreign architecture raises is a "no"
            problem = problem or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    raise ValueError(f"No small {config.model_type!r} model can be built: {problem}")


def _build(config: PreTrainedConfig, seed: int, auto: Any, reads: bool) -> PreTrainedModel:
    with torch.device("meta"):
        model = auto.from_config(copy.deepcopy(config))
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_NUMBERS:
        raise ValueError("what is said of its size in its config cannot be made smaller.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:  # logits that are not flat
                    parameter.mul_(4)
            if reads:
                model(input_ids=torch.ones(1, 4, dtype=torch.long))
    return model


def reduced(
    config: PreTrainedConfig,
    widths: dict[str, Any] = _SMALL,
    *,
    cut: str = "all",
    towers: bool = False,
) -> PreTrainedConfig:
    """Reduce a config and those in it.

    Args:
        config: stays as it is.
        widths: what is set where it is there.
        cut: whose layers are cut: of "all" configs, of the "text" alone, or of none ("").
        towers: whether what sees and hears keeps its widths, and the text its vocabulary, in which
            theirs has a place.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    words = getattr(text, "vocab_size", None)
    for part in {id(c): c for c in (config, text, *_parts(config))}.values():
        cutting = cut == "all" or (cut == "text" and part is text)
        # An encoder of text has the vocabulary of its decoder.
        vocabulary = (
            part is text or part is config or (words and vars(part).get("vocab_size") == words)
        )
        narrow = widths if part is text or not towers else _SHALLOW
        _reduce(part, narrow, cut=cutting, vocabulary=bool(vocabulary) and not towers)
    return type(config).from_dict(config.to_dict())  # may find something wrong


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _parts(value)


def _reduce(text: PreTrainedConfig, widths: dict[str, Any], cut: bool, vocabulary: bool) -> None:
    values = vars(text)
    heterogeneous = "_heterogeneity_spec" in values
    per_layer = text.to_dict().get("per_layer_config") if heterogeneous else None
    kept = _cut(text) if cut else []
    before = dict(values)
    alike = values.get("num_key_value_heads") in (None, values.get("num_attention_heads"))
    for key, value in widths.items():
        if _is_number(values.get(key)) and values[key] > value:
            _set(text, key, value)
        elif isinstance(values.get(key), list) and all(map(_is_number, values[key])):
            _set(text, key, [min(n, value) for n in values[key]])
    if widths:
        _keep_relations(text, before)
        if isinstance(values.get("architecture"), str):
            given = dict(values.get("model_args") or {}) if widths is _SHALLOW else {}
            _set(text, "model_args", {k: _SHALLOW.get(k, value) for k, value in given.items()})
            _set(text, "architecture", values["architecture"] if widths is _SHALLOW else _TOWER)
    for key in ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"):
        if widths and values.get(key):
            _set(text, key, 4 if alike else min(2, values[key]))
    for key in _WINDOWS:
        if widths and _is_number(values.get(key)) and values[key] > _WINDOW:
            _set(text, key, _WINDOW)
    for key, value in list(values.items()):
        if vocabulary and value and _is_number(value) and key.startswith("vocab_size"):
            _set(text, key, VOCABULARY)
        # -1 is said of tokens that a text of ids lacks, such as those of pictures.
        if _is_number(value) and key.endswith(("token_id", "token_index")):
            _set(text, key, 0 if key[:3] in ("pad", "bos", "eos") else VOCABULARY - 1)
        if key == "eos_token_id" and isinstance(value, list):
            _set(text, key, 0)
    if per_layer and kept:
        _keep_per_layer(text, per_layer, kept)


def _keep_relations(text: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Let widths that depended on each other do so still: rotated and other dimensions of a head,
    and how the rotated ones are shared out between axes."""
    values: dict[str, Any] = vars(text)
    rope, plain = (values.get(f"qk_{name}_head_dim") or 0 for name in ("rope", "nope"))
    for key in ("head_dim", "qk_head_dim") if rope and plain else ():
        if _is_number(before.get(key)):
            alone = before[key] == before["qk_rope_head_dim"]
            _set(text, key, rope if alone else rope + plain)
    count, inner = values.get("mamba_n_heads"), values.get("mamba_d_ssm")
    if _is_number(count) and _is_number(values.get("mamba_d_head")):
        inner = inner or values.get("mamba_expand", 2) * values["hidden_size"]
        _set(text, "mamba_d_head", inner // count)
    if _is_number(values.get("num_heads")) and "state_size" in values and "expand" in values:
        wide = values["expand"] * values["hidden_size"]
        _set(text, "num_heads", wide // values.get("head_dim", wide))
    if "qk_dim_factor" in values:  # of few channels a part is rounded up to all
        _set(text, "qk_dim_factor", 1.0)
    heads = before.get("num_attention_heads") or 1
    width = before.get("head_dim") or (before.get("hidden_size") or heads) // heads
    for rotary in (values.get("rope_parameters"), values.get("rope_scaling")):
        if not isinstance(rotary, dict):
            continue
        for key in ("short_factor", "long_factor"):
            if isinstance(rotary.get(key), list):
                rotary[key] = rotary[key][: len(rotary[key]) * 16 // width]
        section = rotary.get("mrope_section")
        if section:
            before_total = sum(section)
            total = rope // 2 if rope else before_total * 16 // width
            parts = [n * total // before_total for n in section[:-1]]
            rotary["mrope_section"] = [*parts, total - sum(parts)]


def _keep_per_layer(text: PreTrainedConfig, per_layer: dict[Any, Any], chosen: list[int]) -> None:
    """Leave the chosen layers of what a config says of single ones."""
    given = {int(key): layer for key, layer in per_layer.items()}
    settings = {n: dict(given.get(old, {})) for n, old in enumerate(chosen)}
    for layer in settings.values():
        heads, groups = layer.get("num_attention_heads"), layer.get("num_key_value_heads")
        for key, value in layer.items():
            if _is_number(value):
                layer[key] = min(value, 2 * (_SMALL.get(key) or value))
        if heads and heads == groups:
            layer["num_key_value_heads"] = layer["num_attention_heads"]
        if "qk_nope_head_dim" in layer:
            layer["head_dim"] = layer["qk_nope_head_dim"] + vars(text)["qk_rope_head_dim"]
    text.per_layer_config = {n: layer for n, layer in settings.items() if layer}


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _set(config: PreTrainedConfig, key: str, value: Any) -> None:
    kind = getattr(type(config), key, None)
    if not isinstance(kind, property) or kind.fset is not None:
        setattr(config, key, value)


def _cut(text: PreTrainedConfig) -> list[int]:
    """Leave two layers of a config, and one of every kind that does not attend: which."""
    values = vars(text)
    name = next((n for n in _LAYERS if _is_number(values.get(n))), None)
    if name is None:
        return []
    before, kinds = values[name], getattr(text, "layer_types", None)
    layers = min(2, before)
    if kinds:
        chosen = _one_of_each(kinds)
        if values.get("num_kv_shared_layers"):  # of every kind one that shares another's keys
            shared = [n for n in chosen if kinds[n] in ATTENDING]
            _set(text, "num_kv_shared_layers", len(shared))
            chosen = chosen + shared
        layers = len(chosen)
    for key, value in list(values.items()):  # what else is said of every layer
        if isinstance(value, list | tuple) and len(value) == before and before > 2:
            kept = chosen if kinds else range(before - layers, before)
            _set(text, key, [value[n] for n in kept])
    _set(text, name, layers)
    return chosen if kinds else list(range(before - layers, before))


def _one_of_each(kinds: list[str]) -> list[int]:
    """Choose layers of every kind, two that attend first: tiny memories name these."""
    attending = [n for n, kind in enumerate(kinds) if kind in ATTENDING]
    others = [n for n, kind in enumerate(kinds) if kind not in ATTENDING]
    first = attending[:1]
    more = [n for n in attending if kinds[n] != kinds[first[0]]] + attending[1:]
    first += more[:1] if more else first
    kept: dict[str, int] = {}
    for n in others:
        kept.setdefault(kinds[n], n)
    return (first + list(kept.values()))[: len(kinds)]
