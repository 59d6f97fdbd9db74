"""How much of an associative recall task is answered right, beside its controls."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.backbones.adapters import lora_disabled
from memwrap.evaluation.controls import MEMORY, OFF, SHUFFLED, TRUNCATED
from memwrap.evaluation.measure import Costs
from memwrap.evaluation.saved_result import SavedResult
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState
from memwrap.tasks.associative import AssociativeTask


@dataclass
class RecallResult(SavedResult):
    """Accuracy by distance in segments, for the memory and its controls.

    Attributes:
        task: settings of the task.
        pairs: pairs stored: a number, or None where a distance d means d pairs, the first asked.
        distances: segments between a pair and its query.
        samples: rows at each distance.
        chance: accuracy of guessing.
        accuracy: by curve ("memory", "memory off", "memory shuffled"), one value a distance.
        seconds: by curve, time of all samples; reading the pairs counts for "memory".
        peak_bytes: by curve, most memory in use; None where the system does not tell.
        passes: times that the pairs were read.
    """

    format: ClassVar[str] = "memwrap-recall"

    task: dict[str, Any]
    pairs: int | None
    distances: list[int]
    samples: int
    chance: float
    accuracy: dict[str, list[float]]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    passes: int = 1

    def error(self, accuracy: float) -> float:
        """Compute the binomial standard error."""
        return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / self.samples)

    def table(self) -> str:
        """Write a Markdown table: accuracy by distance."""
        head = ["distance in segments", *map(str, self.distances)]
        rows = [head, ["---"] * len(head)]
        for name, values in self.accuracy.items():
            cells = [f"{v:.2f} ± {self.error(v):.2f}" for v in values]
            rows.append([name, *cells])
        rows.append(["chance", *[f"{self.chance:.2f}"] * len(self.distances)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@torch.no_grad()
def evaluate_recall(
    model: MemoryModelForCausalLM,
    task: AssociativeTask,
    *,
    distances: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    pairs: int | None = None,
    samples: int = 256,
    batch_size: int = 128,
    passes: int = 1,
    controls: tuple[str, ...] = (OFF, SHUFFLED, TRUNCATED),
    seed: int = 0,
    progress: bool = True,
) -> RecallResult:
    """Share of answers that are right in all their symbols, by distance.

    The answer's symbols are predicted with the right ones before them; all right there is the
    same as greedy generation being right.

    Args:
        model: segments must be as long as the task's pairs.
        task: which keys, values and ids.
        distances: segments between the pair asked for and the query.
        pairs: pairs stored; None: as many as the distance, so that the first is asked for.
        samples: rows at each distance.
        batch_size: rows at once.
        passes: times that the pairs are read.
        controls: curves beside the memory: "memory off", "memory shuffled", and "base, truncated":
            the backbone without adapters, which sees the whole text as far as its window reaches.
        seed: of the samples.
        progress: show a bar.

    Raises:
        ValueError: if the model's segments have another length than the task's, or `passes` as for
            `model.read`.
    """
    if model.segment_size != task.segment_size:
        raise ValueError(
            f"The task's pairs have {task.segment_size} tokens, the model's segments "
            f"{model.segment_size}; they must agree."
        )
    was_training = model.training
    model.eval()
    accuracy: dict[str, list[float]] = {name: [] for name in (MEMORY, *controls)}
    costs = Costs()
    for distance in tqdm(distances, desc="recall", disable=not progress):
        right = dict.fromkeys(accuracy, 0)
        generator = torch.Generator().manual_seed(seed * 1000 + distance)
        for first in range(0, samples, batch_size):
            rows = min(batch_size, samples - first)
            ids, labels = task.sample(
                rows, generator, num_pairs=pairs or distance, distance=distance
            )
            for name, answers in _answers(model, task, ids, list(accuracy), costs, passes).items():
                wanted = labels[:, -task.value_size - 1 : -1]
                right[name] += int((answers == wanted).all(1).sum())
        for name, count in right.items():
            accuracy[name].append(count / samples)
    model.train(was_training)
    return RecallResult(
        asdict(task), pairs, list(distances), samples, task.chance, accuracy, **asdict(costs),
        passes=passes,
    )  # fmt: skip


def _answers(
    model: MemoryModelForCausalLM,
    task: AssociativeTask,
    ids: Tensor,
    curves: list[str],
    costs: Costs,
    passes: int,
) -> dict[str, Tensor]:
    """Choose what each curve holds likeliest as the values asked for, `(B, value_size)`.

    The memory and its read controls answer from one state of the pairs.
    """
    ids, first = ids.to(model.device), ids.shape[1] - task.segment_size
    with costs.of(MEMORY, model.device):
        state = model.read(ids[:, :first], passes=passes)
    answers = {}
    keep = task.value_size + 2
    for name in curves:
        with costs.of(name, model.device):
            logits = _last_logits(model, ids, first, state, name)
        answers[name] = logits[:, -keep : -keep + task.value_size].argmax(-1).cpu()
    return answers


def _last_logits(
    model: MemoryModelForCausalLM, ids: Tensor, first: int, state: MemoryState, name: str
) -> Tensor:
    """Compute logits that end with those of the question, whose columns begin at `first`."""
    if name == TRUNCATED:
        window = min(model.parts.config.max_position_embeddings, ids.shape[1])
        with lora_disabled(model.backbone):
            return model.backbone(input_ids=ids[:, -window:], use_cache=False).logits
    control = None if name == MEMORY else name.removeprefix("memory ")
    return model(input_ids=ids[:, first:], cache=state.clone(), memory_control=control).logits
