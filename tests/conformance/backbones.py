"""The backbones of model cases, built from what the cases say."""

from __future__ import annotations

import re
from typing import Any

import torch
from cases import Case, Entries
from one_layer import scaled_rope
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

# The cases' names of a setting, and the one of transformers.
NAMES = {
    "vocab": "vocab_size", "hidden": "hidden_size", "n_embd": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "H": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "Hkv": "num_key_value_heads", "d": "head_dim",
    "intermediate": "intermediate_size", "rms_eps": "rms_norm_eps", "norm_eps": "rms_norm_eps",
    "layer_norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
    "tied_head": "tie_word_embeddings", "max_positions": "max_position_embeddings",
    "n_positions": "max_position_embeddings", "activation": "activation",
    "rope_theta": "rope_theta", "arch": "arch",
}  # fmt: skip
KNOWN = NAMES | {n: n for n in NAMES.values()}
# How the cases of RMT and ARMT say it.
WORDS = re.compile(
    r"Backbone: HF LlamaForCausalLM.*?: vocab (?P<vocab>\d+), hidden (?P<hidden>\d+), "
    r"(?P<layers>\d+) layers, (?P<heads>\d+) heads, (?P<kv_heads>\d+) kv heads, "
    r"head_dim (?P<d>\d+), intermediate (?P<intermediate>\d+) \(SwiGLU, silu\), "
    r"RMSNorm eps (?P<rms_eps>[\d.e-]+), RoPE theta (?P<rope_theta>\d+).*?, "
    r"(?P<tied>tied|untied) lm_head, no biases"
)


def sizes_of(settings: Entries) -> dict[str, Any]:
    """The backbone's sizes among settings, by the names of transformers."""
    return {KNOWN[n]: settings[n] for n in settings if n in KNOWN}


def sizes_in_words(case: Case) -> dict[str, Any]:
    """The backbone's sizes where only the description holds them."""
    match = WORDS.search(case.says)
    assert match, f"{case.name}: its backbone is not understood: {case.says[:200]!r}"
    words: dict[str, Any] = match.groupdict()
    tied = words.pop("tied") == "tied"
    number = {n: float(x) if n in ("rms_eps", "rope_theta") else int(x) for n, x in words.items()}
    return {KNOWN[n]: x for n, x in number.items()} | {"tie_word_embeddings": tied}


def backbone_of(case: Case, sizes: dict[str, Any]) -> Any:
    """A Llama, an OPT where positions are learned (`rope_theta` None), or a GPT-2 (`arch`), with
    the case's weights, in the case's precision."""
    sizes = dict(sizes)
    arch = sizes.pop("arch", "OPT" if sizes.get("rope_theta", 0) is None else "LlamaForCausalLM")
    make = {"GPT2LMHeadModel": gpt2, "OPT": opt, "LlamaForCausalLM": llama}[arch]
    tied = bool(sizes.get("tie_word_embeddings"))
    model = make(sizes)
    weights = case.starting("base.")
    missing, foreign = model.load_state_dict(weights, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if tied else set()), f"{case.name}: no {missing}"
    assert not foreign, f"{case.name}: {foreign} are no weights of the backbone"
    model.tie_weights()
    return in_precision(model.eval(), case.dtype)


def llama(sizes: dict[str, Any]) -> LlamaForCausalLM:
    own = {
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
        "rope_parameters": scaled_rope(sizes.pop("rope_theta", 10000)),
    }  # fmt: skip
    given = {n: x for n, x in sizes.items() if x is not None}
    return LlamaForCausalLM._from_config(LlamaConfig(**own | given), attn_implementation="eager")


def opt(sizes: dict[str, Any]) -> OPTForCausalLM:
    assert sizes.pop("rope_theta") is None and sizes.pop("rms_norm_eps") == 1e-5
    assert sizes.pop("num_key_value_heads") == sizes["num_attention_heads"]
    config = OPTConfig(
        ffn_dim=sizes.pop("intermediate_size"), word_embed_proj_dim=sizes["hidden_size"],
        dropout=0.0, attention_dropout=0.0, **sizes,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config, attn_implementation="eager")


def gpt2(sizes: dict[str, Any]) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=sizes.pop("hidden_size"), n_layer=sizes.pop("num_hidden_layers"),
        n_head=sizes.pop("num_attention_heads"), n_positions=sizes.pop("max_position_embeddings"),
        activation_function=sizes.pop("activation"), layer_norm_epsilon=sizes.pop("rms_norm_eps"),
        bos_token_id=0, eos_token_id=0, **sizes,
    )  # fmt: skip
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """The model in `dtype`. Transformers' RMSNorm and eager softmax are float32 whatever the model
    is; for float64 they are replaced. Angles stay float32, as in the references."""
    if dtype == torch.float32:
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    model.set_attn_implementation("sdpa")
    return model.to(dtype)


def base_gradients(model: Any, case: Case) -> dict[str, Tensor]:
    """Gradients of the backbone's parameters, those that the case holds."""
    prefix = "grad.base."
    parameters = dict(model.backbone.named_parameters())
    names = [n for n in case.tensors if n.startswith(prefix)]
    return {n: parameters[n.removeprefix(prefix)].grad for n in names}
