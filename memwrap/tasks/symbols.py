"""Tasks over token ids: no words, no tokenizer, answers inside the text."""

from __future__ import annotations

import random
import uuid
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from memwrap.tasks.associative import AssociativeTask
from memwrap.tasks.base import Sample, Span, Task, Text, fit, register


def alphabet(tokenizer: PreTrainedTokenizerBase, limit: int = 8192) -> list[int]:
    """Choose ids that stand for symbols: the vocabulary without special tokens, at most `limit`."""
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(len(tokenizer)) if i not in special]
    return ids[-limit:]


def _need(name: str, length: int, least: int) -> None:
    if length < least:
        raise ValueError(f"{name} needs at least {least} tokens; got length {length}.")


@register("mqar", pairs=8)
@register("mqar_64", pairs=64)
class MultiQuery(Task):
    """Multi-query associative recall (Arora et al. 2023, Zoology): pairs first, then queries at
    power-law gaps, random ids between them. The wanted value does not stand in the text."""

    source = "Zoology; vocabulary of the tokenizer (at most 8,192 ids), random filler"
    POWER = 0.01

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        ids = alphabet(tokenizer)
        count, length = self.pairs, length // 2 * 2
        _need(self.name, length, 4 * count)
        draw = np.random.default_rng(seed)
        half = len(ids) // 2
        keys = draw.choice(half, count, replace=False)
        values = half + draw.choice(len(ids) - half, count, replace=False)
        space = (length - 2 * count) // 2
        weights = self.POWER * np.arange(1, space + 1) ** (self.POWER - 1)
        gaps = draw.choice(space, count, replace=False, p=weights / weights.sum())
        text = draw.integers(0, len(ids), length + 1)
        text[: 2 * count : 2], text[1 : 2 * count : 2] = keys, values
        places = 2 * count + 2 * gaps
        text[places] = keys
        labels = [-100] * length
        answers: list[Span] = []
        facts: list[list[Span]] = []
        for pair in np.argsort(places):
            column = int(places[pair]) + 1
            if column < length:
                labels[column] = ids[int(values[pair])]
                answers.append((column, column + 1))
                facts.append([(int(2 * pair), int(2 * pair) + 2)])
        shown = [ids[int(i)] for i in text[:length]]
        return Sample(shown, facts, 2 * count, tuple(answers), labels)


@register("remember", rewrite=False)
@register("rewrite", rewrite=True)
class Associative(Task):
    """ARMT's associative retrieval (Rodkin et al. 2024, section 4): as many pairs as fit, one
    query. Keys and values of one symbol up to 16 pairs, of two beyond."""

    source = "ARMT; symbols are the last 19 ids that are no special tokens"

    def __init__(self, rewrite: bool) -> None:
        self.rewrite = rewrite

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        key_size = 1
        while not self.rewrite and 16**key_size < length // (key_size + 3) - 1:
            key_size += 1
        segment = key_size + 3
        _need(self.name, length, 2 * segment)
        pairs = length // segment - 1
        task = AssociativeTask.of_ids(
            alphabet(tokenizer)[-19:], key_size=key_size, num_pairs=pairs, rewrite=self.rewrite
        )
        draw = random.Random(seed)
        where = draw.randrange(pairs) if depth is None else round(depth * (pairs - 1))
        generator = torch.Generator().manual_seed(seed)
        ids, labels = task.sample(1, generator, distance=pairs - where)
        ask = pairs * segment
        answer = (ask + key_size + 1, ask + key_size + 2)
        fact = (where * segment, (where + 1) * segment)
        return Sample(ids[0].tolist(), [[fact]], ask, (answer,), labels[0].tolist())


@register("copy", selective=False)
@register("selective_copy", selective=True)
class Copy(Task):
    """Random ids, a mark, the same ids again; `selective`: 16 ids among noise, without it."""

    source = "copying and selective copying (Arjovsky et al. 2016; Gu and Dao 2023)"
    KEPT = 16

    def __init__(self, selective: bool) -> None:
        self.selective = selective

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        ids = alphabet(tokenizer)
        mark, noise, symbols = ids[-1], ids[-2], ids[:-2]
        _need(self.name, length, 2 * self.KEPT + 1)
        draw = random.Random(seed)
        if self.selective:
            room = length - self.KEPT - 1
            places = sorted(draw.sample(range(room), self.KEPT))
        else:
            room = (length - 1) // 2
            places = list(range(room))
        kept = [draw.choice(symbols) for _ in places]
        text = [noise] * room
        for column, symbol in zip(places, kept, strict=True):
            text[column] = symbol
        text += [mark, *kept]
        labels = [-100] * (room + 1) + kept
        answers = [(room + 1 + i, room + 2 + i) for i in range(len(kept))]
        facts = [[(p, p + 1)] for p in places]
        return Sample(text, facts, room, tuple(answers), labels)


@register("updates")
class Updates(Task):
    """Keys whose values are set again and again; the last value of a key counts."""

    source = "last write wins, as in MemoryPrompt's fact updates; own form"
    KEYS = 8

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        ids = alphabet(tokenizer)
        _need(self.name, length, 2 * self.KEYS + 3)
        draw = random.Random(seed)
        mark, symbols = ids[-1], ids[:-1]
        keys = draw.sample(symbols[: len(symbols) // 2], self.KEYS)
        values = symbols[len(symbols) // 2 :]
        count = (length - 3) // 2
        # Every key is set once, then at random; the asked one no more after its place.
        asked = draw.randrange(self.KEYS)
        last = draw.randrange(self.KEYS - 1, count) if depth is None else round(depth * (count - 1))
        order = [draw.randrange(self.KEYS) for _ in range(count)]
        others = [k for k in range(self.KEYS) if k != asked]
        order = [draw.choice(others) if i > last and k == asked else k for i, k in enumerate(order)]
        order[last] = asked
        text, value = [], 0
        for index, key in enumerate(order):
            drawn = draw.choice(values)
            text += [keys[key], drawn]
            value = drawn if index == last else value
        ask = len(text)
        text += [mark, keys[asked], value]
        labels = [-100] * (len(text) - 1) + [value]
        fact = (2 * last, 2 * last + 2)
        return Sample(text, [[fact]], ask, ((ask + 2, ask + 3),), labels)


@register("threading")
class Threading(Task):
    """A list of `key: value` lines in which five values are keys again: follow the thread."""

    max_new_tokens = 48
    source = "needle threading (Roberts et al. 2024): uuids in a JSON object, five steps; seeded"
    STEPS = 5

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        def make(count: int) -> Sample:
            draw = random.Random(seed)

            def name() -> str:
                return str(uuid.UUID(int=draw.getrandbits(128), version=4))

            thread = [name() for _ in range(self.STEPS + 1)]
            lines = [(a, b, True) for a, b in pairwise(thread)]
            lines += [(name(), name(), False) for _ in range(count)]
            draw.shuffle(lines)
            text = Text().add("The JSON object holds pairs of keys and values.\n{")
            for key, value, wanted in lines:
                text.add(f'"{key}": "{value}"', fact=wanted).add(",\n")
            text.add("}\n")
            text.question(
                "A value may itself be a key: follow the thread to its end. Starting from the key "
                f'"{thread[0]}", the final value is: "'
            )
            return text.encode(tokenizer, (thread[-1],), thread[-1])

        return fit(make, length, self.max_new_tokens, self.name)
