"""Associative recall: the generated task of the ARMT paper, for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

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
        """Return the last 19 ids of a vocabulary, for symbols and marks."""
        if vocab_size < SYMBOLS + 3:
            raise ValueError(f"A vocabulary of {vocab_size} is too small; 19 ids are needed.")
        return list(range(vocab_size - SYMBOLS - 3, vocab_size))

    @classmethod
    def of_ids(cls, ids: list[int], **settings: Any) -> AssociativeTask:
        """Return the task over 19 ids: 16 symbols, then separator, question mark and end."""
        sep, gen, eos = ids[SYMBOLS:]
        return cls(symbols=ids[:SYMBOLS], sep=sep, gen=gen, eos=eos, **settings)

    @classmethod
    def for_vocabulary(cls, vocab_size: int, **settings: Any) -> AssociativeTask:
        """Return the task over the last 19 ids of a vocabulary."""
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
        """Turn later copies of the key at `place` into other keys, uniformly."""
        other = torch.randint(1, self.num_keys, numbers.shape, generator=generator)
        again = (numbers == numbers[:, place : place + 1]) & (
            torch.arange(numbers.shape[1]) > place
        )
        return torch.where(again, (numbers + other) % self.num_keys, numbers)

    def _segments(self, digits: Tensor, values: Tensor, mark: int) -> tuple[Tensor, Tensor]:
        """Write segments `key mark value EOS` in a row, and labels of their values."""
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
        """Count the most pairs in batch number `batch`."""
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
