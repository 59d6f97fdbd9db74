"""What the proofs share: a tiny trained-from-nothing llama, documents, arguments for trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import memwrap

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 64
SETTINGS: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    "logging_steps": 1, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "rmt": {"num_memory_tokens": 2},
    "armt": {"num_memory_tokens": 2, "d_mem": 8},
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def wrapped(name: str = "armt", base: Any = None, **settings: Any) -> Any:
    base = llama() if base is None else base
    torch.manual_seed(1)
    return memwrap.wrap(base, name, **{"segment_size": 8} | OWN.get(name, {}) | settings)


def documents(lengths: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    return [{"input_ids": row} for row in rows]


def losses_of(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word `w0` ... is one token."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
