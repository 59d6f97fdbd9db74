"""Train a small Llama-architecture LM and its tokenizer from scratch, on a CPU or a GPU."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from memwrap.data.stdlib_corpus import stdlib_corpus, write_manifest
from memwrap.io.atomic_files import write_text
from memwrap.memories.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Settings


class PretrainConfig(Settings):
    """The settings of `recipes/pretrain_tiny.yaml`. Lengths are in tokens, times in seconds."""

    output: str = "tiny-lm"
    vocab_size: PositiveInt = 4096
    hidden_size: PositiveInt = 256
    intermediate_size: PositiveInt = 768
    num_layers: PositiveInt = 6
    num_heads: PositiveInt = 8
    num_kv_heads: PositiveInt = 4
    context: PositiveInt = 512
    batch_size: PositiveInt = 16
    learning_rate: NonNegativeFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.1
    warmup_steps: NonNegativeInt = 60
    max_steps: PositiveInt = 1000
    eval_every: PositiveInt = 100
    seed: int = 0


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: str | Path
) -> PreTrainedTokenizerBase:
    """Train a sentencepiece BPE (byte fallback, spaces kept) and save it for `AutoTokenizer`.

    Pieces may span runs of spaces, so that indentation costs one token.
    """
    import sentencepiece

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "tokenizer")
        lines = (line for text in texts for line in text.splitlines(keepends=True))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=prefix,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=65536,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=1,
        )
        (Path(folder) / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "LlamaTokenizer",
                    "add_bos_token": True,
                    "add_prefix_space": False,
                    "legacy": False,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                    "pad_token": "<pad>",
                    "clean_up_tokenization_spaces": False,
                    "padding_side": "left",
                }
            )
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        shutil.copy(prefix + ".model", output / "tokenizer.model")
    tokenizer.save_pretrained(output)
    return tokenizer


class _Windows(torch.utils.data.Dataset):
    """Windows of `context` tokens at shifting offsets of one long stream of documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], context: int):
        ids: list[int] = []
        for text in texts:
            ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        self.ids = torch.tensor(ids)
        self.context = context

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # A random offset each time, so that later epochs do not see the same cuts.
        slack = len(self.ids) - len(self) * self.context
        offset = random.randrange(max(1, min(self.context, slack + self.context)))
        start = min(index * self.context + offset, len(self.ids) - self.context)
        window = self.ids[start : start + self.context]
        return {"input_ids": window, "labels": window.clone()}


class _Log(TrainerCallback):
    """Write the loss curve beside the checkpoint while the training runs."""

    def __init__(self, path: Path):
        self.path, self.start = path, time.time()
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {"step": state.global_step, "seconds": round(time.time() - self.start, 1)}
        row |= {
            k: v for k, v in (logs or {}).items() if k in ("loss", "eval_loss", "learning_rate")
        }
        if len(row) > 2:
            self.rows.append(row)
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.rows))


def pretrain(config: PretrainConfig) -> Path:
    """Train the tokenizer and the LM, and save both with the manifest and the loss curve.

    Returns:
        The folder, loadable by `AutoModelForCausalLM` and `AutoTokenizer`.
    """
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_manifest(output / "manifest.json")
    texts = {s: [d.text for d in stdlib_corpus(s)] for s in ("train", "validation")}
    tokenizer = train_tokenizer(texts["train"], config.vocab_size, output)
    train = _Windows(tokenizer, texts["train"], config.context)
    validation = _Windows(tokenizer, texts["validation"], config.context)
    print(f"{len(train.ids):,} training tokens, {len(validation.ids):,} validation tokens")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            initializer_range=1 / math.sqrt(config.hidden_size),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                adam_beta2=0.95,
                max_grad_norm=1.0,
                warmup_steps=config.warmup_steps,
                lr_scheduler_type="cosine",
                max_steps=config.max_steps,
                eval_strategy="steps",
                eval_steps=config.eval_every,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                seed=config.seed,
            ),
            train_dataset=train,
            eval_dataset=validation,
            callbacks=[_Log(output / "loss.jsonl")],
        )
        trainer.train()
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.config.use_cache = True  # training turns it off
    model.save_pretrained(output)
    return output
