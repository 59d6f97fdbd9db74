"""What all tasks share: samples, text with marked facts, fitting a length, the names."""

from __future__ import annotations

import difflib
import random
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
TASKS: dict[str, Callable[[], Task]] = {}

FIRST_SEED = 1 << 40
"""Seeds of training begin here, far from those that evaluations draw from."""


@dataclass(frozen=True)
class Sample:
    """One text with what it asks.

    Attributes:
        ids: the prompt `(T,)`; everything a model is given.
        facts: for each answer, the `(first, end)` columns of `ids` that it depends on.
        ask: column at which the question begins; the text before can be read once.
        answers, labels: where answers are part of the text: their `(first, end)` columns, and
            `(T,)` the id wanted at a column, predicted from the columns before it, or -100.
            None where the answer is generated.
        answer: ids of a right answer behind the prompt, for training and teacher forcing.
        references: strings that a generated answer is scored by.
    """

    ids: list[int]
    facts: list[list[Span]]
    ask: int
    answers: tuple[Span, ...] = ()
    labels: list[int] | None = None
    answer: tuple[int, ...] = ()
    references: tuple[str, ...] = ()

    def training_row(self, end: int | None = None) -> dict[str, list[int]]:
        """Make `input_ids` and `labels`; the loss is on the answers alone.

        Args:
            end: the id that ends a generated answer, part of it: a number that goes on and on is
                another number.
        """
        if self.labels is not None:
            return {"input_ids": self.ids, "labels": self.labels}
        answer = [*self.answer, *([] if end is None else [end])]
        return {"input_ids": self.ids + answer, "labels": [-100] * len(self.ids) + answer}


class Task(ABC):
    """A way to make samples.

    Attributes:
        name: what it is called.
        max_new_tokens: the longest answer that is generated; 0 where answers are in the text.
        ends: training predicts the id that ends a text behind an answer.
        source: where it was published, and what is different here.
    """

    name: str
    max_new_tokens: int = 0
    ends: bool = True
    source: ClassVar[str] = ""

    @abstractmethod
    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        """Make a sample.

        Args:
            tokenizer: of the model.
            length: most tokens of prompt and answer together; texts come close to it.
            seed: everything random comes from it.
            depth: where the (first) fact stands, 0 at the start, 1 at the end; None: drawn.

        Raises:
            ValueError: if the task does not fit in `length`.
        """

    def score(self, text: str, references: tuple[str, ...]) -> float:
        """Share of references found in a generated answer, between 0 and 1."""
        return sum(r.lower() in text.lower() for r in references) / len(references)


T = TypeVar("T", bound=Task)


def register(name: str, **settings: Any) -> Callable[[type[T]], type[T]]:
    """Make a task known under a name; one class may serve several."""

    def add(cls: type[T]) -> type[T]:
        def make() -> Task:
            made = cls(**settings)
            made.name = name
            return made

        TASKS[name] = make
        return cls

    return add


def available() -> list[str]:
    """Name all tasks."""
    return sorted(TASKS)


def task(name: str) -> Task:
    """Make the task of a name.

    Raises:
        ValueError: for an unknown name; suggests the nearest.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no task {name!r}. {hint}Known: {', '.join(available())}.")
    return TASKS[name]()


class Text:
    """A text put together from pieces, some of which are facts."""

    def __init__(self) -> None:
        self.text = ""
        self.facts: list[Span] = []
        self.ask = 0

    def add(self, piece: str, *, fact: bool = False) -> Text:
        """Append a piece."""
        if fact:
            self.facts.append((len(self.text), len(self.text) + len(piece)))
        self.text += piece
        return self

    def question(self, piece: str) -> Text:
        """Append the question: what comes before is the context."""
        self.ask = len(self.text)
        return self.add(piece)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        references: tuple[str, ...],
        answer: str | None = None,
    ) -> Sample:
        """Return the text as a sample; `answer` (default: the references) follows the prompt."""
        ids, columns = _encode(tokenizer, self.text)
        following = _following(tokenizer, self.text, ids, answer or " " + ", ".join(references))
        return Sample(
            ids,
            [[columns(span) for span in self.facts]],
            columns((self.ask, len(self.text)))[0],
            answer=tuple(following),
            references=references,
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], Callable[[Span], Span]]:
    """Find ids, and the columns that hold a span of characters."""
    if not getattr(tokenizer, "is_fast", False):

        def measured(span: Span) -> Span:
            first, end = (len(tokenizer(text[:x], verbose=False)["input_ids"]) for x in span)
            return min(first, len(ids) - 1), end

        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids, measured
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    starts = [a for a, _ in encoded["offset_mapping"]]
    ends = [b for _, b in encoded["offset_mapping"]]

    def looked_up(span: Span) -> Span:
        return bisect_right(ends, span[0]), bisect_left(starts, span[1])

    return encoded["input_ids"], looked_up


def _following(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], answer: str
) -> list[int]:
    """Find the ids of an answer as they follow the text's."""
    both = tokenizer(text + answer, verbose=False)["input_ids"]
    if both[: len(ids)] == ids and len(both) > len(ids):
        return both[len(ids) :]
    return tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]


def fit(make: Callable[[int], Sample], length: int, reserve: int, name: str) -> Sample:
    """Find the sample with the largest count that fits: doubling, then halving the interval.

    Args:
        make: the sample of a count (of sentences, lines, characters), longer with the count.
        length: most tokens of prompt and answer.
        reserve: tokens kept for the answer.
        name: of the task, for the error.

    Raises:
        ValueError: if not even count 1 fits.
    """

    def fits(count: int) -> Sample | None:
        made = make(count)
        size = len(made.ids) + max(reserve, len(made.answer))
        return made if size <= length else None

    best = fits(1)
    if best is None:
        made = make(1)
        raise ValueError(
            f"{name} needs at least {len(made.ids) + max(reserve, len(made.answer))} tokens; "
            f"got length {length}."
        )
    low, high = 1, 2
    while (fitting := fits(high)) is not None:
        best, low, high = fitting, high, high * 2
    while high - low > max(1, low // 256):  # as near as half a percent
        middle = (low + high) // 2
        fitting = fits(middle)
        if fitting is None:
            high = middle
        else:
            best, low = fitting, middle
    return best


def place(count: int, depth: float | None, draw: random.Random) -> int:
    """Return an index among `count + 1` gaps: at a depth, or drawn."""
    return draw.randint(0, count) if depth is None else round(depth * count)
