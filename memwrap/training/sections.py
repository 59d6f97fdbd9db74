"""The sections of a recipe: each checks its own values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memwrap.tasks import available
from memwrap.tasks.associative import SYMBOLS
from memwrap.training.arguments import parse_curriculum

DTYPES = ("auto", "float32", "bfloat16", "float16")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr")


def need(condition: bool, key: str, got: Any, needed: str) -> None:
    """Raise a ValueError that names the key, what it got and what it needs."""
    if not condition:
        raise ValueError(f"`{key}` is {got!r}; it must be {needed}.")


def expanded(path: str) -> str:
    """A path with `~` replaced, which no shell does behind `key=`; any other text as it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _parse(key: str, text: str) -> None:
    """A curriculum's errors, with the key it has here."""
    try:
        parse_curriculum(text)
    except ValueError as error:
        raise ValueError(str(error).replace("`segment_curriculum`", f"`{key}`")) from error


@dataclass(kw_only=True)
class ModelSection:
    """The backbone.

    Attributes:
        name: a folder, the name of a shipped model (`tiny-lm`), or a repo id on the Hub.
        scratch: instead of `name`, fields of a `LlamaConfig`: a new backbone with random
            weights (recall only: it needs no tokenizer).
        dtype: of the backbone's weights; the memory's and LoRA's are float32. `auto`: as saved.
        attn_implementation: `sdpa`, `eager`, or `auto` for what transformers takes.
        revision: of a repo on the Hub.
    """

    name: str = "tiny-lm"
    scratch: dict[str, Any] | None = None
    dtype: str = "auto"
    attn_implementation: str = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        self.name = expanded(self.name)
        need(bool(self.name), "model.name", self.name, "a folder or a name")
        need(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        known = ("auto", "sdpa", "eager")
        attention = self.attn_implementation
        need(attention in known, "model.attn_implementation", attention, "auto, sdpa or eager")


@dataclass(kw_only=True)
class LoraSection:
    """LoRA in the backbone.

    Attributes:
        r: rank.
        alpha: scale (`null`: 2 r).
        dropout: of the adapters' input.
        target_modules: names of linear layers, or `all-linear`.
    """

    r: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        need(self.r > 0, "lora.r", self.r, "at least 1")
        need(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "positive, or null")
        need(0 <= self.dropout < 1, "lora.dropout", self.dropout, "at least 0 and below 1")
        need(bool(self.target_modules), "lora.target_modules", self.target_modules, "not empty")


@dataclass(kw_only=True)
class DataSection:
    """Documents to train on (see `memwrap.data.documents.load_documents`).

    Attributes:
        source: `stdlib`, a folder, a .txt/.md/.pdf file, or `datasets:NAME[:SPLIT[:COLUMN]]`.
        split: which part is trained on (`null`: all).
        eval_split: which part is evaluated on (`null`: no evaluation).
        max_tokens: documents are cut into pieces of at most so many tokens (`null`: whole).
        min_tokens: shorter pieces are dropped.
        join_short: join documents shorter than `min_tokens` with their neighbours.
        limit: read at most so many documents.
        eval_limit: evaluate on at most so many pieces.
        template: text of a dataset's row, its columns in braces, instead of one column.
        options: keywords for `datasets.load_dataset`, such as `name`.
    """

    source: str = "stdlib"
    split: str | None = "train"
    eval_split: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 2
    join_short: bool = False
    limit: int | None = None
    eval_limit: int = 16
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = expanded(self.source)
        need(bool(self.source), "data.source", self.source, "'stdlib', a path or 'datasets:NAME'")
        need(self.min_tokens >= 2, "data.min_tokens", self.min_tokens, "at least 2")
        longest, least = self.max_tokens, self.min_tokens
        fits = longest is None or longest >= least
        need(fits, "data.max_tokens", longest, f"at least data.min_tokens ({least}), or null")
        need(self.limit is None or self.limit > 0, "data.limit", self.limit, "at least 1, or null")
        need(self.eval_limit > 0, "data.eval_limit", self.eval_limit, "at least 1")


@dataclass(kw_only=True)
class RecallSection:
    """Associative recall: key-value pairs, one a segment, then questions.

    Attributes:
        tasks: `remember` (distinct keys) and `rewrite` (a key may come again; its last value
            counts); batches take turns.
        key_size: symbols of a key.
        value_size: symbols of a value.
        num_pairs: most pairs a sample; each batch draws from `min_pairs` to it.
        min_pairs: fewest pairs a sample.
        num_queries: questions a sample; each is a segment.
        curriculum: most pairs by batch, as in `0:4,200:8`; capped by `num_pairs`.
        ids: 19 token ids: the 16 symbols, then what stands for separator, question and end.
            Default: the last of the vocabulary.
    """

    tasks: list[str] = field(default_factory=lambda: ["remember", "rewrite"])
    key_size: int = 1
    value_size: int = 1
    num_pairs: int = 8
    min_pairs: int = 2
    num_queries: int = 4
    curriculum: str | None = None
    ids: list[int] | None = None

    def __post_init__(self) -> None:
        good = bool(self.tasks) and set(self.tasks) <= {"remember", "rewrite"}
        need(good, "recall.tasks", self.tasks, "a list of remember, rewrite or both")
        for name in ("key_size", "value_size", "min_pairs", "num_queries"):
            need(getattr(self, name) > 0, f"recall.{name}", getattr(self, name), "at least 1")
        pairs, least = self.num_pairs, self.min_pairs
        need(pairs >= least, "recall.num_pairs", pairs, f"at least recall.min_pairs ({least})")
        if "remember" in self.tasks:
            most = SYMBOLS**self.key_size
            need(pairs <= most, "recall.num_pairs", pairs, f"at most {most}, the number of keys")
        if self.curriculum is not None:
            _parse("recall.curriculum", self.curriculum)
        if self.ids is not None:
            good = len(set(self.ids)) == len(self.ids) == SYMBOLS + 3 and min(self.ids) >= 0
            need(good, "recall.ids", self.ids, f"{SYMBOLS + 3} different token ids")

    @property
    def segment_size(self) -> int:
        """Tokens of a pair: key, separator, value, end."""
        return self.key_size + self.value_size + 2


@dataclass(kw_only=True)
class TasksSection:
    """Tasks of the evaluation suite; the loss is on their answers.

    Attributes:
        names: of the tasks; batches take turns.
        min_tokens, max_tokens: each batch draws a length between them.
        curriculum: most tokens by batch, as in `0:256,200:1024`; capped by `max_tokens`.
    """

    names: list[str] = field(default_factory=lambda: ["passkey"])
    min_tokens: int = 256
    max_tokens: int = 512
    curriculum: str | None = None

    def __post_init__(self) -> None:
        need(bool(self.names), "tasks.names", self.names, "a list of tasks")
        unknown = [name for name in self.names if name not in available()]
        need(not unknown, "tasks.names", unknown, f"among {', '.join(available())}")
        most, least = self.max_tokens, self.min_tokens
        need(most >= least > 0, "tasks.max_tokens", most, f"at least tasks.min_tokens ({least})")
        if self.curriculum is not None:
            _parse("tasks.curriculum", self.curriculum)


@dataclass(kw_only=True)
class TrainerSection:
    """How to train.

    Attributes:
        steps: optimizer steps.
        max_minutes: stop after so many minutes (`null`: no limit).
        batch_size: documents a step and device.
        accumulation: batches a step.
        learning_rate: of LoRA and of the backbone.
        memory_learning_rate: of the memory (`null`: learning_rate).
        weight_decay: of weights; biases and norms get none.
        warmup_steps: steps of rising learning rate.
        schedule: of the learning rate after that.
        max_grad_norm: gradients are clipped to this norm.
        adam_beta2: second moment of AdamW.
        segment_curriculum: segments of each document by step, as in `0:2,500:4`.
        vary_segments: draw the number of segments up to the curriculum's.
        distillation_weight, distillation_temperature: follow the backbone as it was, with its
            own attention over whole rows; see `MemoryTrainingArguments`.
        label_weight: of the cross entropy with the text beside a distillation.
        streaming: run the backward pass every `memory.bptt_segments` segments.
        gradient_checkpointing: recompute segments in the backward pass.
        precision: `fp32`, `bf16` or `fp16` arithmetic; `auto`: bf16 where the GPU has it.
        device: `auto` or `cpu`.
        seed: of everything random.
        log_every: steps between log rows.
        save_every: steps between checkpoints (`null`: none; needed to resume).
        eval_every: steps between evaluations (`null`: at the end only).
        workers: processes that prepare batches.
    """

    steps: int = 1000
    max_minutes: float | None = None
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    memory_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    segment_curriculum: str | None = None
    vary_segments: bool = False
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    label_weight: float = 1.0
    streaming: bool = True
    gradient_checkpointing: bool = False
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    log_every: int = 10
    save_every: int | None = None
    eval_every: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every"):
            value = getattr(self, name)
            need(value > 0, f"trainer.{name}", value, "at least 1")
        for name in ("max_minutes", "save_every", "eval_every"):
            value = getattr(self, name)
            need(value is None or value > 0, f"trainer.{name}", value, "positive, or null")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "workers"):
            value = getattr(self, name)
            need(value >= 0, f"trainer.{name}", value, "0 or more")
        rate = self.memory_learning_rate
        good = rate is None or rate >= 0
        need(good, "trainer.memory_learning_rate", rate, "0 or more, or null")
        need(0 < self.adam_beta2 < 1, "trainer.adam_beta2", self.adam_beta2, "between 0 and 1")
        for name, allowed in (
            ("schedule", SCHEDULES), ("precision", PRECISIONS), ("device", ("auto", "cpu"))
        ):  # fmt: skip
            value = getattr(self, name)
            need(value in allowed, f"trainer.{name}", value, f"one of {', '.join(allowed)}")
        weight, temperature = self.distillation_weight, self.distillation_temperature
        need(weight >= 0, "trainer.distillation_weight", weight, "0 or more")
        need(temperature > 0, "trainer.distillation_temperature", temperature, "above 0")
        labels = self.label_weight
        good = labels >= 0 and (labels == 1 or weight > 0)
        need(good, "trainer.label_weight", labels, "1, or with a distillation 0 or more")
        if self.segment_curriculum is not None:
            _parse("trainer.segment_curriculum", self.segment_curriculum)
        elif self.vary_segments:
            raise ValueError(
                "`trainer.vary_segments` needs `trainer.segment_curriculum`, for example '0:8'."
            )


__all__ = [
    "DataSection",
    "LoraSection",
    "ModelSection",
    "RecallSection",
    "TrainerSection",
    "expanded",
    "need",
]
