"""Tasks scored by depth and length, for the memory and its controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from memwrap.backbones.adapters import lora_disabled
from memwrap.evaluation.controls import (
    CURVES,
    FULL,
    MEMORY,
    OFF,
    SHUFFLED,
    TRUNCATED,
    WINDOW,
    own_context,
    windowed,
)
from memwrap.evaluation.measure import Costs
from memwrap.evaluation.saved_result import SavedResult
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState
from memwrap.tasks import Sample, task

DEPTHS = 5
PIECE = 1024
"""Tokens, of all rows, whose logits are computed at once."""
AT_ONCE = 8192
"""Tokens of texts that are read together, those with as many each in rows of a batch."""
Feed = Callable[[Tensor], Tensor]


@dataclass
class Cell:
    """One task at one length, read in one way.

    Attributes:
        task, length, curve: what was read, and how.
        samples, answers: texts, and what they asked in all.
        accuracy: mean over samples of the share that was right.
        low, high: 95 % interval (Wilson's, by samples).
        depth: accuracy by depth of the fact asked for, in equal parts from start to end; NaN
            where no fact lay.
        seconds: for all samples, reading included.
        peak_bytes: most memory of the process (CPU) or tensors (GPU) in that time, if known; of
            all texts that are read together.
    """

    task: str
    length: int
    curve: str
    samples: int
    answers: int
    accuracy: float
    low: float
    high: float
    depth: list[float]
    seconds: float
    peak_bytes: int | None


@dataclass
class SuiteResult(SavedResult):
    """All cells, and what they were measured with."""

    format: ClassVar[str] = "memwrap-suite"
    records: ClassVar[dict[str, type]] = {"cells": Cell}

    model: str
    seed: int
    window: int
    segment_size: int
    cells: list[Cell] = field(default_factory=list)
    passes: int = 1

    def tasks(self) -> list[str]:
        """Name the tasks, in the order they ran."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def table(self) -> str:
        """Write a Markdown table: accuracy by length, one line a task and curve."""
        lengths = sorted({cell.length for cell in self.cells})
        rows = [["task", "curve", *[f"{n:,}" for n in lengths]]]
        cell_of = {(c.task, c.curve, c.length): c for c in self.cells}
        for name, curve in dict.fromkeys((c.task, c.curve) for c in self.cells):
            cells = [cell_of.get((name, curve, n)) for n in lengths]
            texts = [f"{c.accuracy:.2f} ({c.low:.2f}-{c.high:.2f})" if c else "-" for c in cells]
            rows.append([name, curve, *texts])
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@torch.no_grad()
def evaluate_tasks(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    lengths: list[int],
    *,
    samples: int = 20,
    controls: tuple[str, ...] = CURVES[1:],
    window: int | None = None,
    passes: int = 1,
    seed: int = 0,
    name: str = "",
    progress: bool = True,
) -> SuiteResult:
    """Measure the accuracy of tasks at lengths, for the memory and its controls. Texts with as many
    tokens are read in rows of one batch.

    Answers inside the text count as right if all their ids are the likeliest ones; answers
    behind it are generated greedily and scored as the task says. Depths of the facts are spread
    evenly over the samples.

    Args:
        model: a memwrap model.
        tokenizer: of its backbone.
        tasks: names from `memwrap.tasks.available()`.
        lengths: tokens of prompt and answer.
        samples: texts of each task and length.
        controls: "memory off" (the question and what stands in its segment, an empty memory),
            "memory shuffled" (another text's memory), and the backbone without adapters on the
            last window of the text, on all of it as far as 4 windows and its positions reach, and
            with window and sinks.
        window: of the base (default: the backbone's context).
        passes: times that the whole segments before the question are read into the memory.
        seed: of the samples.
        name: of the model, for reports.
        progress: show a bar.

    Raises:
        ValueError: for an unknown task or control, or a length that a task does not fit in.
    """
    unknown = sorted(set(controls) - set(CURVES[1:]))
    if unknown:
        raise ValueError(f"Unknown controls {unknown}; allowed: {', '.join(CURVES[1:])}.")
    if samples < 1:
        raise ValueError(f"`samples` is {samples}; at least 1.")
    window = window or own_context(model)
    result = SuiteResult(name, seed, window, model.segment_size, passes=passes)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(tasks) * len(lengths) * (samples + 1), disable=not progress)
    try:
        for task_name in tasks:
            for length in lengths:
                bar.set_description(f"{task_name} {length:,}")
                scores = _Scores(model, tokenizer, task_name, length, window, passes)
                scores.run(samples, (MEMORY, *controls), seed, bar)
                result.cells += scores.cells(samples)
    finally:
        bar.close()
        model.train(was_training)
    return result


@dataclass
class _Text:
    """A text, and how much of it is read before the question's segment."""

    sample: Sample
    boundary: int


def _loads(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    """Take texts together that have `AT_ONCE` tokens at most, or one that has more."""
    load: list[_Text] = []
    for text in texts:
        if load and sum(len(t.sample.ids) for t in [*load, text]) > AT_ONCE:
            yield load
            load = []
        load.append(text)
    if load:
        yield load


def _alike(texts: list[_Text]) -> list[list[int]]:
    """Group the numbers of texts that can be rows of one batch."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault((len(text.sample.ids), text.boundary), []).append(number)
    return list(groups.values())


def _rows(groups: list[list[int]], states: list[MemoryState]) -> list[MemoryState]:
    """Take batches apart: the state of each text, in their order."""
    rows = {
        number: state.select(torch.tensor([row])) if len(group) > 1 else state
        for group, state in zip(groups, states, strict=True)
        for row, number in enumerate(group)
    }
    return [rows[number] for number in sorted(rows)]


class _Scores:
    """Scores of one task at one length."""

    def __init__(
        self, model: MemoryModelForCausalLM, tokenizer: Any, name: str, length: int, window: int,
        passes: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.task, self.length, self.window = task(name), length, window
        self.passes = passes
        self.of_samples: dict[str, list[float]] = {}
        self.of_depth: dict[str, list[list[float]]] = {}
        self.answers = 0
        self.costs = Costs()

    def run(self, samples: int, curves: tuple[str, ...], seed: int, bar: Any) -> None:
        donor: MemoryState | None = None
        if SHUFFLED in curves:  # the first text only lends its memory, and counts for nobody
            donor = self._read([self._text(-1, seed)])
        for texts in _loads(self._text(index, seed) for index in range(samples)):
            groups = _alike(texts)
            with self.costs.of(MEMORY, self.model.device):
                states = [self._read([texts[n] for n in group]) for group in groups]
            donors: list[MemoryState] = []
            if donor is not None:  # a text is lent the memory of the one before it
                donors = [donor, *_rows(groups, states)]
                donor = donors[-1]
            for group, state in zip(groups, states, strict=True):
                lent = MemoryState.cat([donors[n] for n in group]) if donors else None
                batch = [texts[n] for n in group]
                self._ask(batch, {MEMORY: state, SHUFFLED: lent}, curves)
            bar.update(len(texts))

    def _text(self, index: int, seed: int) -> _Text:
        depth = (index % DEPTHS + 0.5) / DEPTHS
        own_seed = seed * 1_000_003 + self.length * 1_009 + index + 1
        sample = self.task.sample(self.tokenizer, self.length, own_seed, depth=depth)
        first = min((a for a, _ in sample.answers), default=sample.ask + 1)
        whole = min(first - 1, sample.ask) // self.model.segment_size
        return _Text(sample, whole * self.model.segment_size)

    def _ids(self, batch: list[_Text]) -> Tensor:
        return torch.tensor([text.sample.ids for text in batch], device=self.model.device)

    def _read(self, batch: list[_Text]) -> MemoryState:
        """Read the whole segments before the questions."""
        state, boundary = self.model.new_state(len(batch)), batch[0].boundary
        if not boundary:
            return state
        ids = self._ids(batch)[:, :boundary]
        return self.model.read(ids, state=state, passes=self.passes)

    def _ask(
        self, batch: list[_Text], states: dict[str, MemoryState | None], curves: tuple[str, ...]
    ) -> None:
        boundary = batch[0].boundary
        self.answers += sum(max(1, len(text.sample.answers)) for text in batch)
        for curve in curves:
            if curve == FULL and not self._reaches():
                continue
            state = states.get(curve) if boundary else None
            with (
                self.costs.of(curve, self.model.device),
                _reader(self.model, curve, state, len(batch), self.window) as feed,
            ):
                from_column = boundary if curve in (MEMORY, OFF, SHUFFLED) else 0
                right = self._right(batch, from_column, curve, feed)
            for text, values in zip(batch, right, strict=True):
                self._note(curve, text.sample, values)

    def _note(self, curve: str, sample: Sample, right: list[float]) -> None:
        self.of_samples.setdefault(curve, []).append(sum(right) / len(right))
        parts = self.of_depth.setdefault(curve, [[] for _ in range(DEPTHS)])
        for facts, value in zip(sample.facts, right, strict=True):
            depth = facts[0][0] / max(1, sample.ask)
            parts[min(DEPTHS - 1, int(depth * DEPTHS))].append(value)

    def _reaches(self) -> bool:
        """Tell whether the base can read the whole text at once."""
        limit = self.model.parts.max_positions
        return self.length <= min(4 * self.window, limit or self.length)

    def _right(self, batch: list[_Text], first: int, curve: str, feed: Feed) -> list[list[float]]:
        """Score every text's answers."""
        ids, samples = self._ids(batch), [text.sample for text in batch]
        if samples[0].labels is None:
            most = self.task.max_new_tokens
            if curve == TRUNCATED:
                first = max(0, ids.shape[1] - self.window + most)
            rows = greedy(feed, ids[:, first:], most, [self.tokenizer.eos_token_id])
            texts = (self.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
            return [[self.task.score(t, s.references)] for t, s in zip(texts, samples, strict=True)]
        if curve == TRUNCATED:
            likeliest = [
                _sliding(self.model, row[None], min(a for a, _ in sample.answers), self.window)
                for row, sample in zip(ids, samples, strict=True)
            ]
        else:
            parts = [feed(part).argmax(-1) for part in _pieces(ids[:, first:])]
            likeliest = [(row, first) for row in torch.cat(parts, 1)]
        return [
            _of_answers(s, guesses.tolist(), column)
            for s, (guesses, column) in zip(samples, likeliest, strict=True)
        ]

    def cells(self, samples: int) -> list[Cell]:
        cells = []
        for curve, scores in self.of_samples.items():
            accuracy = sum(scores) / len(scores)
            low, high = wilson(accuracy, samples)
            cell = Cell(
                self.task.name,
                self.length,
                curve,
                samples,
                self.answers,
                accuracy,
                low,
                high,
                depth=[sum(p) / len(p) if p else math.nan for p in self.of_depth[curve]],
                seconds=round(self.costs.seconds[curve], 3),
                peak_bytes=self.costs.peak_bytes.get(curve),
            )
            cells.append(cell)
        return cells


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share of `count` trials."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = z * spread / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@contextmanager
def _reader(
    model: MemoryModelForCausalLM,
    curve: str,
    state: MemoryState | None,
    rows: int,
    window: int,
) -> Iterator[Feed]:
    """Make a function from the next ids `(B, T)` of texts to their logits `(B, T, V)`."""
    if curve in (MEMORY, OFF, SHUFFLED):
        memory_state = model.new_state(rows) if state is None else state.clone()
        yield lambda ids: model(input_ids=ids, cache=memory_state).logits
        return
    if curve == WINDOW:
        with windowed(model, window, rows) as (feed, _):
            yield lambda ids: feed(ids, None)
        return
    cache = DynamicCache(config=model.parts.config)
    with lora_disabled(model.backbone):
        yield lambda ids: model.backbone(input_ids=ids, **{model.parts.cache_name: cache}).logits


def greedy(feed: Feed, ids: Tensor, most: int, ends: Collection[int]) -> list[list[int]]:
    """Generate at most `most` ids behind each row of `ids`, the likeliest each, up to one that
    ends."""
    for part in _pieces(ids):
        logits = feed(part)
    tokens = logits[:, -1:].argmax(-1)
    while tokens.shape[1] < most and not all(set(row) & set(ends) for row in tokens.tolist()):
        tokens = torch.cat([tokens, feed(tokens[:, -1:])[:, -1:].argmax(-1)], 1)
    rows = tokens.tolist()
    lengths = ((n for n, token in enumerate(row, 1) if token in ends) for row in rows)
    return [row[: next(length, most)] for row, length in zip(rows, lengths, strict=True)]


def _pieces(ids: Tensor) -> tuple[Tensor, ...]:
    return ids.split(max(1, PIECE // len(ids)), 1)


def _of_answers(sample: Sample, guesses: list[int], first: int) -> list[float]:
    """Score the answers in a text by the likeliest ids behind its columns from `first` on."""
    labels = sample.labels or []
    return [
        float(all(guesses[c - 1 - first] == labels[c] for c in range(a, b)))
        for a, b in sample.answers
    ]


def _sliding(
    model: MemoryModelForCausalLM, ids: Tensor, first: int, window: int
) -> tuple[Tensor, int]:
    """Predict the backbone's likeliest next ids from column `first - 1` on, with at least half a
    window before each (as far as the text has it); also gives the column of the first of them."""
    column, parts = first - 1, []
    half = max(1, window // 2)
    with lora_disabled(model.backbone):
        while column < ids.shape[1]:
            end = min(column + half, ids.shape[1])
            start = max(0, end - window)
            logits = model.backbone(input_ids=ids[:, start:end], use_cache=False).logits
            parts.append(logits[0, column - start :].argmax(-1))
            column = end
    return torch.cat(parts), first - 1
