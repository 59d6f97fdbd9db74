"""The sections of a recipe: what each of their keys takes."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from memwrap.memories.settings import (
    Fraction,
    Kind,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Settings,
)
from memwrap.tasks import available
from memwrap.tasks.associative import SYMBOLS
from memwrap.training.arguments import parse_curriculum


def _is_curriculum(text: str) -> bool:
    try:
        return bool(parse_curriculum(text))
    except ValueError:
        return False


Text = Annotated[str, Kind("text (not empty)", bool)]
Curriculum = Annotated[
    str, Kind("text of STEP:NUMBER from step 0 on, as in '0:2,500:4'", _is_curriculum)
]


def expanded(path: str) -> str:
    """Return a path with `~` replaced, which no shell does behind `key=`; any other text as it
    is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


class Section(Settings):
    """A part of a recipe; errors call its fields by their keys."""

    prefix: ClassVar[str] = ""

    @classmethod
    def _called(cls, name: str) -> str:
        return f"`{cls.prefix}{name}`"


class ModelSection(Section):
    """The backbone.

    Attributes:
        name: a folder, the name of a shipped model (`tiny-lm`), or a repo id on the Hub.
        scratch: instead of `name`, fields of a `LlamaConfig`: a new backbone with random
            weights (recall only: it needs no tokenizer).
        dtype: of the backbone's weights; the memory's and LoRA's are float32. `auto`: as saved.
        attn_implementation: `sdpa`, `eager`, or `auto` for what transformers takes.
        revision: of a repo on the Hub.
    """

    prefix = "model."

    name: Text = "tiny-lm"
    scratch: dict[str, Any] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    revision: str | None = None

    def __post_init__(self) -> None:
        self.name = expanded(self.name)


class LoraSection(Section):
    """LoRA in the backbone.

    Attributes:
        r: rank.
        alpha: scale (`null`: 2 r).
        dropout: of the adapters' input.
        target_modules: names of linear layers, or `all-linear`.
    """

    prefix = "lora."

    r: PositiveInt = 16
    alpha: PositiveInt | None = None
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    target_modules: Text | list[str] = "all-linear"

    def validate_target_modules(self) -> None:
        if isinstance(self.target_modules, str) and set(self.target_modules) & set("*+?{}()[]|"):
            allowed = "a list of names, or all-linear; matching a pattern can take for ever"
            self.refuse("target_modules", allowed)


class DataSection(Section):
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

    prefix = "data."

    source: Text = "stdlib"
    split: str | None = "train"
    eval_split: str | None = None
    max_tokens: PositiveInt | None = None
    min_tokens: Annotated[int, Range(2)] = 2
    join_short: bool = False
    limit: PositiveInt | None = None
    eval_limit: PositiveInt = 16
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source = expanded(self.source)

    def validate_lengths(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            self.refuse("max_tokens", f"at least data.min_tokens ({self.min_tokens}), or null")


class RecallSection(Section):
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

    prefix = "recall."

    tasks: list[Literal["remember", "rewrite"]] = field(
        default_factory=lambda: ["remember", "rewrite"]
    )
    key_size: PositiveInt = 1
    value_size: PositiveInt = 1
    num_pairs: PositiveInt = 8
    min_pairs: PositiveInt = 2
    num_queries: PositiveInt = 4
    curriculum: Curriculum | None = None
    ids: list[NonNegativeInt] | None = None

    def validate_pairs(self) -> None:
        if self.num_pairs < self.min_pairs:
            self.refuse("num_pairs", f"at least recall.min_pairs ({self.min_pairs})")
        if "remember" in self.tasks and self.num_pairs > SYMBOLS**self.key_size:
            self.refuse("num_pairs", f"at most {SYMBOLS**self.key_size}, the number of keys")

    def validate_ids(self) -> None:
        if self.ids and not len(set(self.ids)) == len(self.ids) == SYMBOLS + 3:
            self.refuse("ids", f"{SYMBOLS + 3} different token ids")

    @property
    def segment_size(self) -> int:
        """Tokens of a pair: key, separator, value, end."""
        return self.key_size + self.value_size + 2


class TasksSection(Section):
    """Tasks of the evaluation suite; the loss is on their answers.

    Attributes:
        names: of the tasks; batches take turns.
        min_tokens, max_tokens: each batch draws a length between them.
        curriculum: most tokens by batch, as in `0:256,200:1024`; capped by `max_tokens`.
        text_targets: tokens of a row's own text that are targets beside the answer, drawn anew for
            each row: a memory that is trained on answers alone may harm the text between them.
    """

    prefix = "tasks."

    names: list[str] = field(default_factory=lambda: ["passkey"])
    min_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 512
    curriculum: Curriculum | None = None
    text_targets: NonNegativeInt = 0

    def validate_names(self) -> None:
        if not set(self.names) <= set(available()):
            self.refuse("names", f"among {', '.join(available())}")

    def validate_lengths(self) -> None:
        if self.max_tokens < self.min_tokens:
            self.refuse("max_tokens", f"at least tasks.min_tokens ({self.min_tokens})")


class StartSection(Section):
    """The start of a memory, before the first step.

    Attributes:
        text: memory tokens are the embeddings of this text, as many as it has.
        segments: segments with a fact of the recipe's tasks, and as many without, from which
            memories at layers begin (`LayerMemory.start_layer`); 0: none are read.
    """

    prefix = "start."

    text: Text | None = None
    segments: NonNegativeInt = 0


class LayerChoiceSection(Section):
    """The choice of layers that keep their softmax: those whose conversion costs most recall.

    Attributes:
        keep: so many layers.
        task: of the evaluation suite, whose answers are asked for.
        rows: texts of the task.
        tokens: of these, and of pieces of held-out documents.
        pieces: of held-out documents.
    """

    prefix = "layer_choice."

    keep: PositiveInt = 1
    task: Text = "told_facts"
    rows: PositiveInt = 16
    tokens: PositiveInt = 256
    pieces: PositiveInt = 4

    def validate_task(self) -> None:
        if self.task not in available():
            self.refuse("task", f"one of {', '.join(available())}")


class TrainerSection(Section):
    """The settings of training.

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
        mixer_matching: train each layer's attention with the memory to give what the backbone's
            own gives of the same input, instead of a text: the first stage of a conversion.
        window_dropout, window_dropout_end: share of rows that read a memory's recurrence without
            its window, at the start and at the end (`null`: it stays).
        streaming: run the backward pass every `memory.bptt_segments` segments.
        gradient_checkpointing: recompute segments in the backward pass.
        precision: `fp32`, `bf16` or `fp16` arithmetic; `auto`: bf16 where the GPU has it.
        device: `auto` or `cpu`.
        seed: of everything random.
        log_every: steps between log rows.
        save_every: steps between checkpoints (`null`: none; needed to resume).
        eval_every: steps between evaluations (`null`: at the end only).
        workers: processes that prepare batches.
        report_to: also send losses to `tensorboard`, `wandb`, `trackio` or another that
            transformers knows, several with commas; `none`: only the run's own files.
    """

    prefix = "trainer."

    steps: PositiveInt = 1000
    max_minutes: Annotated[float, Range(above=0)] | None = None
    batch_size: PositiveInt = 1
    accumulation: PositiveInt = 1
    learning_rate: NonNegativeFloat = 1e-4
    memory_learning_rate: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"
    ] = "linear"
    max_grad_norm: NonNegativeFloat = 1.0
    adam_beta2: Annotated[float, Range(above=0, below=1)] = 0.999
    segment_curriculum: Curriculum | None = None
    vary_segments: bool = False
    distillation_weight: NonNegativeFloat = 0.0
    distillation_temperature: Annotated[float, Range(above=0)] = 1.0
    label_weight: NonNegativeFloat = 1.0
    mixer_matching: bool = False
    window_dropout: Fraction = 0.0
    window_dropout_end: Fraction | None = None
    streaming: bool = True
    gradient_checkpointing: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    log_every: PositiveInt = 10
    save_every: PositiveInt | None = None
    eval_every: PositiveInt | None = None
    workers: NonNegativeInt = 0
    report_to: Text = "none"

    def validate_distillation(self) -> None:
        if self.label_weight != 1 and not self.distillation_weight:
            self.refuse("label_weight", "1, or with a distillation 0 or more")

    def validate_mixer_matching(self) -> None:
        if self.mixer_matching and self.distillation_weight:
            self.refuse("mixer_matching", "false with a distillation: it makes no logits")

    def validate_segment_curriculum(self) -> None:
        if self.vary_segments and self.segment_curriculum is None:
            raise ValueError(
                "`trainer.vary_segments` needs `trainer.segment_curriculum`, for example '0:8'."
            )

    def validate_report_to(self) -> None:
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        known = sorted(INTEGRATION_TO_CALLBACK)
        if self.report_to != "none" and not {*self.trackers} <= set(known):
            self.refuse("report_to", f"'none' or among {', '.join(known)}")

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [] if names == ["none"] else names


__all__ = [
    "DataSection",
    "LayerChoiceSection",
    "LoraSection",
    "ModelSection",
    "RecallSection",
    "Section",
    "StartSection",
    "TasksSection",
    "TrainerSection",
    "expanded",
]
