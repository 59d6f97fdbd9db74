"""Training arguments: those of transformers, and what memories need beyond them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import TrainingArguments


def parse_curriculum(text: str) -> list[tuple[int, int]]:
    """Read a segment curriculum.

    Args:
        text: `"STEP:SEGMENTS,STEP:SEGMENTS,..."`, for example `"0:2,500:4,1000:8"`: two
            segments of every document from step 0, four from step 500, eight from step 1000.

    Returns:
        `(step, segments)` pairs in step order.

    Raises:
        ValueError: if an entry is no `STEP:SEGMENTS`, segments are not positive, the first
            step is not 0 or the steps do not increase.
    """
    stages = []
    for entry in text.split(","):
        step, _, segments = (part.strip() for part in entry.partition(":"))
        if not (step.isdecimal() and segments.isdecimal()):
            raise ValueError(
                f"`segment_curriculum` has the entry {entry.strip()!r}; every entry must be "
                "STEP:SEGMENTS in whole numbers, as in '0:2,500:4,1000:8'."
            )
        if int(segments) < 1:
            raise ValueError(
                f"`segment_curriculum` has the entry {entry.strip()!r}; "
                "the number of segments must be at least 1."
            )
        stages.append((int(step), int(segments)))
    if stages[0][0] != 0:
        raise ValueError(
            f"`segment_curriculum` starts at step {stages[0][0]}; it must start at step 0, "
            f"as in '0:{stages[0][1]},...'."
        )
    for (before, _), (after, _) in pairwise(stages):
        if after <= before:
            raise ValueError(
                f"`segment_curriculum` has step {after} after step {before}; steps must increase."
            )
    return stages


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the settings of memory training.

    `prediction_loss_only` is on here: the logits of a whole document are rarely worth keeping.

    Attributes:
        memory_learning_rate: learning rate of the memory's parameters (default:
            `learning_rate`).
        memory_weight_decay: weight decay of the memory's weights (default: `weight_decay`);
            biases and norms get none, as everywhere.
        streaming: run the backward pass every `bptt_segments` segments, so that training
            memory does not grow with the document. Changes no gradient. Without effect where
            the memory's `bptt_segments` is None.
        segment_curriculum: how many of a document's first segments are trained on, by global
            step: `"0:2,500:4,1000:8"` (default: all).
        vary_segments: draw the number of segments in each step uniformly between 1 and what
            the curriculum says; the draw depends on `seed` and the step only.
        distillation_weight: weight of a divergence from the backbone as it was, added to the
            loss of every target: without adapters and memory, with its own attention over the
            whole row, which must therefore fit into its context. 0: none.
        distillation_temperature: by which the logits of both are divided there.
        label_weight: of the cross entropy with the labels beside a distillation; 0: the backbone
            as it was is the only teacher. Evaluation is cross entropy in any case.
        mixer_matching: train each layer's attention with the memory to give what the backbone's
            own attention gives of the same input, segment by segment, instead of a text. The
            loss is the squared error over the squares of what is wanted, a mean over layers.
            Evaluation is cross entropy in any case.
        window_dropout: for a memory with a window beside a recurrence (liger): share of the rows
            that read the recurrence alone, so that it learns to carry weight.
        window_dropout_end: that share at the end of the run, with a straight line between the two
            (default: it stays).

    Raises:
        ValueError: for a curriculum that cannot be read, `vary_segments` without one, a
            negative rate or weight, a temperature that is not positive, or a share that is none.
    """

    prediction_loss_only: bool = field(
        default=True,
        metadata={"help": "Keep only the loss in evaluation, not the logits."},
    )
    memory_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the memory's parameters (default: learning_rate)."},
    )
    memory_weight_decay: float | None = field(
        default=None,
        metadata={"help": "Weight decay of the memory's weights (default: weight_decay)."},
    )
    streaming: bool = field(
        default=True,
        metadata={"help": "Run the backward pass every `bptt_segments` segments."},
    )
    segment_curriculum: str | None = field(
        default=None,
        metadata={"help": "Segments trained on by global step, as in '0:2,500:4,1000:8'."},
    )
    vary_segments: bool = field(
        default=False,
        metadata={"help": "Draw the number of segments between 1 and the curriculum's."},
    )

    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the divergence from the backbone as it was (0: none)."},
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of both distributions in the distillation."},
    )
    label_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the labels' cross entropy beside a distillation."},
    )
    mixer_matching: bool = field(
        default=False,
        metadata={"help": "Compare layers' attention with the memory to the backbone's own."},
    )
    window_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of rows that read a memory's recurrence without its window."},
    )
    window_dropout_end: float | None = field(
        default=None,
        metadata={"help": "That share at the end of the run (default: it stays)."},
    )

    def __post_init__(self) -> None:
        for name in ("window_dropout", "window_dropout_end"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share}; it must be from 0 to 1.")
        weights = ("memory_weight_decay", "distillation_weight", "label_weight")
        for name in ("memory_learning_rate", *weights):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` is {value}; it must be 0 or more.")
        if self.distillation_temperature <= 0:
            got = self.distillation_temperature
            raise ValueError(f"`distillation_temperature` is {got}; it must be above 0.")
        if self.mixer_matching and self.distillation_weight:
            raise ValueError(
                f"`distillation_weight` is {self.distillation_weight} beside `mixer_matching`, "
                "which makes no logits; set one of them to 0."
            )
        if self.label_weight != 1 and not self.distillation_weight:
            raise ValueError(
                f"`label_weight` is {self.label_weight} without a distillation; set "
                "`distillation_weight`, or leave it at 1."
            )
        if self.segment_curriculum is not None:
            parse_curriculum(self.segment_curriculum)
        elif self.vary_segments:
            raise ValueError(
                "`vary_segments` needs `segment_curriculum` to draw below, for example '0:8'."
            )
        super().__post_init__()

    def window_dropout_at(self, done: float) -> float:
        """Return the share of rows that read without a window after a part `done` of the run."""
        start, end = self.window_dropout, self.window_dropout_end
        return start if end is None else start + (end - start) * done

    def segments_at(self, step: int) -> int | None:
        """Return the number of segments of each document that global step `step` trains on.

        None stands for whole documents. The same on every device and after a resume.
        """
        if self.segment_curriculum is None:
            return None
        stages = parse_curriculum(self.segment_curriculum)
        current = [segments for start, segments in stages if start <= step][-1]
        if not self.vary_segments:
            return current
        return random.Random(f"{self.seed} {step}").randint(1, current)


__all__ = ["MemoryTrainingArguments", "parse_curriculum"]
