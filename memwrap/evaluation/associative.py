"""Associative recall: the ARMT tasks "remember" and "rewrite" (Rodkin et al. 2024, section 4).

Every pair is one segment, `key SEP value EOS`; a query is `key GEN value EOS` with the value
to be predicted. Nothing but the memory carries from a pair to its query.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm

from memwrap.evaluation.controls import MEMORY, OFF, SHUFFLED, TRUNCATED, lora_disabled
from memwrap.evaluation.measure import Costs
from memwrap.files import write_text
from memwrap.model import MemoryModelForCausalLM
from memwrap.state import MemoryState

SYMBOLS = 16


@dataclass(kw_only=True)
class AssociativeTask:
    """Pairs of keys and values, then queries.

    Attributes:
        key_size, value_size: symbols of a key and of a value.
        num_pairs: pairs of a sample.
        rewrite: keys are drawn with replacement and the last value of a key counts; else all
            keys of a sample are distinct.
        symbols: ids of the 16 symbols.
        sep, gen, eos: ids of the marks.
    """

    key_size: int = 1
    value_size: int = 1
    num_pairs: int = 4
    rewrite: bool = False
    symbols: list[int] = field(default_factory=lambda: list(range(SYMBOLS)))
    sep: int = SYMBOLS
    gen: int = SYMBOLS + 1
    eos: int = SYMBOLS + 2

    def __post_init__(self) -> None:
        if len(self.symbols) != SYMBOLS or len({*self.symbols, self.sep, self.gen, self.eos}) < 19:
            raise ValueError("AssociativeTask needs 16 symbols and 3 marks, all different ids.")
        for name in ("key_size", "value_size", "num_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"AssociativeTask.{name} is {getattr(self, name)}; at least 1.")
        if not self.rewrite and self.num_pairs > self.num_keys:
            raise ValueError(
                f"{self.num_pairs} distinct keys of {self.key_size} symbols do not exist (only "
                f"{self.num_keys}); raise `key_size`."
            )

    @staticmethod
    def last_ids(vocab_size: int) -> list[int]:
        """The last 19 ids of a vocabulary, for symbols and marks."""
        if vocab_size < SYMBOLS + 3:
            raise ValueError(f"A vocabulary of {vocab_size} is too small; 19 ids are needed.")
        return list(range(vocab_size - SYMBOLS - 3, vocab_size))

    @classmethod
    def of_ids(cls, ids: list[int], **settings: Any) -> AssociativeTask:
        """The task over 19 ids: 16 symbols, then separator, question mark and end."""
        sep, gen, eos = ids[SYMBOLS:]
        return cls(symbols=ids[:SYMBOLS], sep=sep, gen=gen, eos=eos, **settings)

    @classmethod
    def for_vocabulary(cls, vocab_size: int, **settings: Any) -> AssociativeTask:
        """The task over the last 19 ids of a vocabulary."""
        return cls.of_ids(cls.last_ids(vocab_size), **settings)

    @property
    def num_keys(self) -> int:
        """How many keys there are."""
        return SYMBOLS**self.key_size

    @property
    def segment_size(self) -> int:
        """Tokens of a pair: key, mark, value, mark."""
        return self.key_size + self.value_size + 2

    @property
    def chance(self) -> float:
        """Accuracy of guessing a value."""
        return SYMBOLS**-self.value_size

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        num_pairs: int | None = None,
        num_queries: int = 1,
        distance: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch.

        Args:
            batch_size: rows.
            generator: all randomness comes from it.
            num_pairs: pairs of these rows (default: the task's).
            num_queries: queries behind the pairs, each a segment.
            distance: ask (once) for the pair so many segments before the query; its key is not
                written again. Default: a random key (its last value counts).

        Returns:
            ids and labels `(batch_size, (num_pairs + num_queries) * segment_size)`; labels are
            -100 but at the queries' values.
        """
        pairs = num_pairs or self.num_pairs
        if distance is not None and not 1 <= distance <= pairs:
            raise ValueError(f"`distance` is {distance}; it must be between 1 and {pairs} pairs.")
        numbers = self._keys(batch_size, pairs, generator)
        if distance is not None:
            asked = torch.full((batch_size, 1), pairs - distance)
            numbers = self._not_again(numbers, pairs - distance, generator)
        else:
            draw = torch.randint(0, pairs, (batch_size, num_queries), generator=generator)
            same = numbers[:, None, :] == numbers.gather(1, draw)[:, :, None]
            asked = (same * torch.arange(1, pairs + 1)).argmax(-1)
        values = torch.randint(
            0, SYMBOLS, (batch_size, pairs, self.value_size), generator=generator
        )
        digits = numbers[..., None] // SYMBOLS ** torch.arange(self.key_size) % SYMBOLS
        text, _ = self._segments(digits, values, self.sep)
        rows = torch.arange(batch_size)[:, None]
        queries, labels = self._segments(digits[rows, asked], values[rows, asked], self.gen)
        return (
            torch.cat([text, queries], 1),
            torch.cat([torch.full_like(text, -100), labels], 1),
        )

    def _keys(self, batch: int, pairs: int, generator: torch.Generator) -> Tensor:
        if self.rewrite:
            return torch.randint(0, self.num_keys, (batch, pairs), generator=generator)
        if pairs > self.num_keys:
            raise ValueError(f"{pairs} distinct keys do not exist; there are {self.num_keys}.")
        rows = [torch.randperm(self.num_keys, generator=generator)[:pairs] for _ in range(batch)]
        return torch.stack(rows)

    def _not_again(self, numbers: Tensor, place: int, generator: torch.Generator) -> Tensor:
        """Later copies of the key at `place` become other keys, uniformly."""
        other = torch.randint(1, self.num_keys, numbers.shape, generator=generator)
        again = (numbers == numbers[:, place : place + 1]) & (
            torch.arange(numbers.shape[1]) > place
        )
        return torch.where(again, (numbers + other) % self.num_keys, numbers)

    def _segments(self, digits: Tensor, values: Tensor, mark: int) -> tuple[Tensor, Tensor]:
        """Segments `key mark value EOS` in a row, and labels of their values."""
        symbols = torch.tensor(self.symbols)
        batch, count = digits.shape[:2]
        marks = torch.full((batch, count, 1), mark)
        ends = torch.full((batch, count, 1), self.eos)
        ids = torch.cat([symbols[digits], marks, symbols[values], ends], -1)
        labels = torch.full_like(ids, -100)
        labels[..., self.key_size + 1 : -1] = symbols[values]
        return ids.flatten(1), labels.flatten(1)


class AssociativeDataset(IterableDataset):
    """Endless batches for training: each item is one row `{input_ids, labels}`.

    Rows of one batch have equal lengths: the number of pairs is drawn once a batch.

    Args:
        tasks: taken in turn, batch by batch.
        batch_size: rows of a batch.
        min_pairs, max_pairs: pairs of a batch are drawn from this range.
        num_queries: queries a sample.
        seed: of everything random.
        curriculum: `(batch, pairs)`: the most pairs from that batch on; `max_pairs` caps it.
    """

    def __init__(
        self,
        tasks: list[AssociativeTask],
        *,
        batch_size: int,
        min_pairs: int = 2,
        max_pairs: int = 8,
        num_queries: int = 4,
        seed: int = 0,
        curriculum: list[tuple[int, int]] | None = None,
    ) -> None:
        self.tasks, self.batch_size = tasks, batch_size
        self.min_pairs, self.max_pairs = min_pairs, max_pairs
        self.num_queries, self.seed = num_queries, seed
        self.curriculum = curriculum or [(0, max_pairs)]

    def most_pairs(self, batch: int) -> int:
        """Most pairs in batch number `batch`."""
        reached = [pairs for first, pairs in self.curriculum if first <= batch]
        return max(self.min_pairs, min(self.max_pairs, reached[-1]))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        batch = 0
        while True:
            task = self.tasks[batch % len(self.tasks)]
            high = self.most_pairs(batch) + 1
            pairs = int(torch.randint(self.min_pairs, high, (1,), generator=generator))
            ids, labels = task.sample(
                self.batch_size, generator, num_pairs=pairs, num_queries=self.num_queries
            )
            for row in range(self.batch_size):
                yield {"input_ids": ids[row], "labels": labels[row]}
            batch += 1


@dataclass
class RecallResult:
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
    """

    task: dict[str, Any]
    pairs: int | None
    distances: list[int]
    samples: int
    chance: float
    accuracy: dict[str, list[float]]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    def error(self, accuracy: float) -> float:
        """Binomial standard error."""
        return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / self.samples)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {"format": "memwrap-recall", "version": 1, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the result as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def table(self) -> str:
        """A Markdown table: accuracy by distance."""
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
        controls: curves beside the memory: "memory off", "memory shuffled", and "base, truncated":
            the backbone without adapters, which sees the whole text as far as its window reaches.
        seed: of the samples.
        progress: show a bar.

    Raises:
        ValueError: if the model's segments have another length than the task's.
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
            for name, answers in _answers(model, task, ids, list(accuracy), costs).items():
                wanted = labels[:, -task.value_size - 1 : -1]
                right[name] += int((answers == wanted).all(1).sum())
        for name, count in right.items():
            accuracy[name].append(count / samples)
    model.train(was_training)
    return RecallResult(
        asdict(task), pairs, list(distances), samples, task.chance, accuracy, **asdict(costs)
    )


def _answers(
    model: MemoryModelForCausalLM,
    task: AssociativeTask,
    ids: Tensor,
    curves: list[str],
    costs: Costs,
) -> dict[str, Tensor]:
    """What each curve holds likeliest as the values asked for, `(B, value_size)`.

    The pairs are read once; the memory and its read controls answer from the same state.
    """
    ids, first = ids.to(model.device), ids.shape[1] - task.segment_size
    with costs.of(MEMORY, model.device):
        state = model.read(ids[:, :first])
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
    """Logits that end with those of the question, whose columns begin at `first`."""
    if name == TRUNCATED:
        window = min(model.parts.config.max_position_embeddings, ids.shape[1])
        with lora_disabled(model.backbone):
            return model.backbone(input_ids=ids[:, -window:], use_cache=False).logits
    control = None if name == MEMORY else name.removeprefix("memory ")
    return model(input_ids=ids[:, first:], cache=state.clone(), memory_control=control).logits
