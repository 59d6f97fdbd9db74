"""Running a recipe: model, data, training, and everything that is written about the run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import ProgressCallback

import memwrap
from memwrap.assets import asset
from memwrap.assets.places import find_model
from memwrap.backbones.auto_classes import load_backbone
from memwrap.data.documents import load_documents, long_documents
from memwrap.io.atomic_files import write_text
from memwrap.io.yaml_files import read_yaml
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.callbacks import Bar, FigureLog, LossLog, TimeLimit
from memwrap.training.collating import DocumentCollator, DocumentDataset
from memwrap.training.held_out import few, held_back, memory_gain, task_rows
from memwrap.training.pretrain import pretrain
from memwrap.training.recall import recall_data
from memwrap.training.recipe import Recipe
from memwrap.training.resuming import last_checkpoint
from memwrap.training.start import start_layers, start_tokens, text_ids, with_text
from memwrap.training.tasks import tasks_data
from memwrap.training.trainer import MemoryTrainer

CHECKPOINTS = "checkpoints"
LOG, RECIPE, RUN = "train_log.jsonl", "recipe.yaml", "run.json"
FIGURES = "figures.jsonl"
_PACKAGES = ("memwrap", "torch", "transformers", "peft", "accelerate", "safetensors")


def run_recipe(recipe: Recipe) -> Path:
    """Do what a recipe says.

    Into `recipe.output` go the model (memory, LoRA, a changed backbone) and its tokenizer,
    `train_log.jsonl` (the loss curve), `figures.jsonl` and `.png` (what the memory shows of itself,
    if it does), `recipe.yaml` (resolved) and `run.json` (command,
    versions, sizes, times).

    Returns:
        The output folder, loadable by `memwrap.load`.

    Raises:
        ValueError: for what can be seen to be wrong before anything is loaded (`preflight`),
            and for models, data and settings that do not fit each other.
    """
    checkpoint = preflight(recipe)
    output = Path(recipe.output)
    if recipe.overwrite and not recipe.resume:
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    start = time.monotonic()
    facts: dict[str, Any] = {}
    if recipe.pretrain is not None:
        pretrain(recipe.pretrain)
        write_text(output / RECIPE, recipe.to_yaml())
    else:
        facts = _train(recipe, output, checkpoint)
    facts["seconds"] = round(time.monotonic() - start, 1)
    if is_first():
        write_text(output / RUN, json.dumps(describe_run(recipe) | facts, indent=2) + "\n")
    return output


def is_first() -> bool:
    """Tell whether this is the only process of the run or the one that writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def preflight(recipe: Recipe) -> Path | None:
    """Check what can be checked before anything is loaded.

    Returns:
        The checkpoint to resume from, if `recipe.resume`.

    Raises:
        ValueError: for an output folder in use, nothing to resume, another model or memory than
            the checkpoint's, or a model or data that is not there.
    """
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` is {recipe.output}, which is a file; give a folder.")
    checkpoint = None
    if recipe.resume:
        checkpoint = _checkpoint(recipe, output)
    elif is_first() and output.is_dir() and any(output.iterdir()) and not recipe.overwrite:
        raise ValueError(
            f"`output` is {recipe.output}, which holds files already. Give resume=true to continue "
            "that run, overwrite=true to replace it, or another output=FOLDER."
        )
    if recipe.task == "pretrain":
        return checkpoint
    name = recipe.model.name
    named = asset(name) is not None or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if not named and not Path(name).is_dir():
        raise ValueError(f"`model.name` is {name!r}, and there is no such folder.")
    _check_trackers(recipe.trainer.trackers)
    if recipe.init_from is not None and not (Path(recipe.init_from) / "config.json").is_file():
        raise ValueError(
            f"`init_from` is {recipe.init_from!r}, which holds no saved model; give the output "
            "folder of a run that has ended."
        )
    source = "stdlib" if recipe.data is None else recipe.data.source
    if source != "stdlib" and not source.startswith("datasets:") and not Path(source).exists():
        raise ValueError(
            f"`data.source` is {source!r}, and there is no such file or folder. Give data.source= "
            "a folder with text, Markdown, HTML or PDF files, 'stdlib' or 'datasets:NAME'."
        )
    return checkpoint


def _check_trackers(names: list[str]) -> None:
    """Refuse trackers whose packages are missing."""
    missing = set(names) - set(get_available_reporting_integrations() if names else [])
    if missing:
        raise ValueError(
            f"`trainer.report_to` names {', '.join(sorted(missing))}, which is not installed; "
            "pip install it, or leave it out."
        )


def _checkpoint(recipe: Recipe, output: Path) -> Path:
    if recipe.task == "pretrain":
        raise ValueError("A 'pretrain' recipe cannot be resumed; give overwrite=true to restart.")
    folder = output / CHECKPOINTS
    last = last_checkpoint(folder)
    if last is None:
        raise ValueError(
            f"There is no checkpoint in {folder} to resume from (a run with trainer.save_every "
            "writes them); leave resume=true out to start anew."
        )
    if (output / RECIPE).is_file():
        before = read_yaml(output / RECIPE)
        if not isinstance(before, dict):
            raise ValueError(f"{output / RECIPE} is damaged: it is no recipe.")
        now = recipe.to_dict()
        for key in ("task", "model", "memory", "lora", "train_backbone"):
            if before.get(key) != now[key]:
                raise ValueError(
                    f"The run in {recipe.output} has `{key}` {before.get(key)}, this recipe has "
                    f"{now[key]}; resume with the same, or give another output=FOLDER."
                )
    return last


def build_model(
    recipe: Recipe,
) -> tuple[memwrap.MemoryModelForCausalLM, PreTrainedTokenizerBase | None]:
    """Return the backbone with its memory and LoRA, ready to train, and its tokenizer.

    Raises:
        ValueError: if the model cannot be loaded or the memory does not fit it.
    """
    base, tokenizer = _base(recipe)
    config, text = recipe.memory_config(), recipe.start.text
    ids = [] if text is None or tokenizer is None else text_ids(text, tokenizer)
    model = memwrap.wrap(base, with_text(config, ids) if ids else config)
    if ids:
        start_tokens(model, ids)
    model.backbone.requires_grad_(recipe.train_backbone)
    lora = recipe.lora
    if lora is not None:
        model.add_lora(
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha or 2 * lora.r,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
            )
        )
    if recipe.tasks is not None and tokenizer is not None:
        names, count = recipe.tasks.names, recipe.start.segments
        start_layers(model, tokenizer, names, count, recipe.trainer.seed)
    if recipe.init_from is not None:
        try:
            model.take_over(recipe.init_from)
        except (OSError, ValueError) as error:
            raise ValueError(f"`init_from` {recipe.init_from!r}: {error}") from error
    return model, tokenizer


def _base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the recipe's backbone, loaded or new, and its tokenizer."""
    section = recipe.model
    if section.scratch is not None:
        return LlamaForCausalLM(LlamaConfig(**section.scratch)), None
    dtype = section.dtype
    if dtype == "auto" and recipe.train_backbone:
        dtype = "float32"  # the optimizer's small steps vanish in bf16 weights
    options = {"revision": section.revision} if section.revision else {}
    attention = section.attn_implementation
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        name: Any = find_model(section.name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        base = load_backbone(name, dtype=dtype, **chosen, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`model.name` {section.name!r} cannot be loaded: {reason}") from error
    return base, tokenizer


@dataclass
class TrainingData:
    """Datasets of a run and how they become batches; `facts` go into `run.json`, `held_out` are
    rows that are not trained on."""

    train: Dataset
    evaluation: Dataset | None
    collator: Any
    facts: dict[str, Any]
    held_out: Any = None


def build_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> TrainingData:
    """Tokenise the recipe's documents, or make its tasks.

    Raises:
        ValueError: as `load_documents` and `DocumentDataset`.
    """
    if recipe.task == "recall":
        rows, collator = recall_data(recipe, vocab_size)
        others, _ = recall_data(recipe, vocab_size, recipe.trainer.seed + 1_000_003)
        return TrainingData(rows, None, collator, {}, iter(others))
    if tokenizer is None:
        raise ValueError(
            f"`model.scratch` has no tokenizer; a {recipe.task!r} recipe needs `model.name`."
        )
    if recipe.task == "tasks":
        made, collate = tasks_data(recipe, tokenizer)
        lengths = made.min_tokens, made.longest(recipe.trainer.steps * recipe.trainer.accumulation)
        held_out: Any = task_rows(recipe.tasks.names, tokenizer, *lengths)  # type: ignore[union-attr]
        return TrainingData(made, None, collate, {}, held_out)
    section = recipe.data
    if section is None:
        raise ValueError("`data` is missing; a 'finetune' recipe needs documents.")

    def pieces(split: str | None, limit: int | None) -> DocumentDataset:
        documents = load_documents(
            section.source, split, limit=limit, template=section.template, **section.options
        )
        if section.join_short:
            documents = long_documents(documents, tokenizer, section.min_tokens)
        return DocumentDataset(documents, tokenizer, section.max_tokens, section.min_tokens)

    train: Any = pieces(section.split, section.limit)
    facts = {"train_pieces": len(train), "train_tokens": train.num_tokens}
    evaluation: Any = None
    if section.eval_split is not None:
        whole = pieces(section.eval_split, section.limit)
        count = min(section.eval_limit, len(whole))
        # Spread over all documents: the first pieces may all be of one.
        chosen = [index * len(whole) // count for index in range(count)]
        evaluation = torch.utils.data.Subset(whole, chosen)
        facts["eval_pieces"] = count
    held_out = evaluation
    if held_out is None:
        train, held_out = held_back(train)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TrainingData(train, evaluation, DocumentCollator(pad), facts, held_out)


def training_arguments(recipe: Recipe, evaluates: bool) -> MemoryTrainingArguments:
    """Return the recipe's `trainer` section as transformers takes it."""
    section = recipe.trainer
    cuda = torch.cuda.is_available() and section.device == "auto"
    precision = section.precision
    if precision == "auto":
        precision = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    every = section.eval_every
    extra: dict[str, Any] = {}
    if section.schedule == "cosine_with_min_lr":
        extra["lr_scheduler_kwargs"] = {"min_lr_rate": 0.1}
    # transformers gave the argument another name; both are checkpointing of whole segments here.
    known = {entry.name for entry in fields(MemoryTrainingArguments)}
    new = "activation_checkpointing"
    extra[new if new in known else "gradient_checkpointing"] = section.gradient_checkpointing
    return MemoryTrainingArguments(
        output_dir=str(Path(recipe.output) / CHECKPOINTS),
        max_steps=section.steps,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.accumulation,
        learning_rate=section.learning_rate,
        memory_learning_rate=section.memory_learning_rate,
        weight_decay=section.weight_decay,
        warmup_steps=section.warmup_steps,
        lr_scheduler_type=section.schedule,
        max_grad_norm=section.max_grad_norm,
        adam_beta2=section.adam_beta2,
        segment_curriculum=section.segment_curriculum,
        vary_segments=section.vary_segments,
        distillation_weight=section.distillation_weight,
        distillation_temperature=section.distillation_temperature,
        label_weight=section.label_weight,
        mixer_matching=section.mixer_matching,
        window_dropout=section.window_dropout,
        window_dropout_end=section.window_dropout_end,
        streaming=section.streaming,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=section.device == "cpu" or not torch.accelerator.is_available(),
        seed=section.seed,
        logging_steps=section.log_every,
        logging_first_step=True,
        save_strategy="steps" if section.save_every else "no",
        save_steps=section.save_every or 500,
        save_total_limit=2,
        eval_strategy="steps" if evaluates and every else "no",
        eval_steps=every,
        eval_on_start=evaluates and not recipe.resume,
        dataloader_num_workers=section.workers,
        dataloader_pin_memory=cuda,
        report_to=section.trackers or "none",
        **extra,
    )


def _train(recipe: Recipe, output: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Train and save; returns facts for `run.json`."""
    section = recipe.trainer
    set_seed(section.seed)
    model, tokenizer = build_model(recipe)
    data = build_data(recipe, tokenizer, model.config.vocab_size)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    log = LossLog(output / LOG, keep_until=done)
    figures = FigureLog(output / FIGURES, keep_until=done)
    limit = TimeLimit(section.max_minutes if section.max_minutes is not None else math.inf)
    trainer = MemoryTrainer(
        model,
        training_arguments(recipe, data.evaluation is not None),
        data.collator,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        callbacks=[log, figures, limit],
    )
    figures.norms = trainer.norms
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar)
    if trainer.is_world_process_zero():  # nothing was wrong so far: the folder is in use now
        write_text(output / RECIPE, recipe.to_yaml())
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if data.evaluation is not None and not any(
        row["step"] == step and "eval_loss" in row for row in log.rows
    ):
        trainer.evaluate()
    if trainer.is_world_process_zero():
        # A backbone made here has no name to be found by.
        model.save_pretrained(output, include_base=True if recipe.model.scratch else None)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    gain: dict[str, Any] = {}
    if trainer.args.world_size == 1 and model.memories:
        rows = few(data.held_out) if data.held_out is not None else []
        shown = bool(rows) and not trainer.args.disable_tqdm
        gain = memory_gain(model, rows, progress=shown) or {"held_out_rows": 0}
    stopped_by = "trainer.max_minutes" if limit.reached else "trainer.steps"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "steps": step,
        "planned_steps": section.steps,
        "stopped_by": "its loss" if trainer.watch.lost else stopped_by,
        "worse_from_step": trainer.watch.wrong,
        "loss": log.last("loss"),
        "eval_loss": log.last("eval_loss"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": trained,
        "memory_parameters": sum(p.numel() for p in model.memory_parameters()),
        "device": str(trainer.args.device),
        **gain,
        **data.facts,
    }


def describe_run(recipe: Recipe) -> dict[str, Any]:
    """Return the command and the versions that a run was made with."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["memwrap"] = memwrap.__version__
    return {
        "command": shlex.join(recipe.command),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions,
    }


__all__ = [
    "build_data",
    "build_model",
    "is_first",
    "preflight",
    "run_recipe",
    "training_arguments",
]
