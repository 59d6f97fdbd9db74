"""A base whose code lies beside its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_base(folder: Path) -> Path:
    """Save a Llama by another name, whose classes lie beside its weights."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    text = (folder / "config.json").read_text()
    code = '"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"'
    text = text.replace(
        '"model_type": "llama"', f'"auto_map": {{{code}}},\n"model_type": "own_llama"'
    )
    (folder / "config.json").write_text(text)
    return folder
