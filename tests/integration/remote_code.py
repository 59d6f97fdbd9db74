"""A base whose code lies beside its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
class OwnConfig(LlamaConfig):
    model_type = "MODEL_TYPE"
class OwnNorm(LlamaRMSNorm):
    def forward(self, hidden):
        return 1.5 * super().forward(hidden)
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = OwnNorm(config.hidden_size, config.rms_norm_eps)
"""


def own_base(folder: Path, model_type: str = "own_llama") -> Path:
    """Save a Llama whose classes lie beside its weights and do something else than transformers'
    own; its type may be one that transformers knows."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.replace("MODEL_TYPE", model_type))
    text = (folder / "config.json").read_text()
    code = '"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"'
    text = text.replace(
        '"model_type": "llama"', f'"auto_map": {{{code}}},\n"model_type": "{model_type}"'
    )
    (folder / "config.json").write_text(text)
    return folder
