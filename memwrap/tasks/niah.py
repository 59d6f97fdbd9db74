"""RULER's needles in a haystack (Hsieh et al. 2024), with the haystacks that need no download."""

from __future__ import annotations

import random
import re
import uuid
from functools import cache

from transformers import PreTrainedTokenizerBase

from memwrap.tasks.base import Sample, Task, Text, fit, register
from memwrap.tasks.passkey import GRASS

TEMPLATE = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n"
)
QUESTION = "\nWhat are all the special magic {kind}s for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind}s for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."


@cache
def words() -> tuple[list[str], list[str]]:
    """List adjectives and nouns of the package wonderwords, sorted.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ValueError(
            "This task draws its words from the package wonderwords: pip install wonderwords "
            "(or memwrap[eval])."
        ) from error
    lists = RandomWord()
    adjectives, nouns = (lists.filter(include_categories=[c]) for c in ("adjective", "noun"))
    return sorted(set(adjectives)), sorted(set(nouns))


@cache
def prose() -> list[str]:
    """List sentences of Python's reference topics: every installation's own English."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if s]


def word(draw: random.Random) -> str:
    adjectives, nouns = words()
    return f"{draw.choice(adjectives)}-{draw.choice(nouns)}"


def number(draw: random.Random) -> str:
    return str(draw.randint(1_000_000, 9_999_999))


def unique(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


KINDS = {"word": word, "number": number, "uuid": unique}


@register("niah_single_1", haystack="repeat")
@register("niah_single_2_pydoc", haystack="pydoc")
@register("niah_single_3_pydoc", haystack="pydoc", value="uuid")
@register("niah_multikey_1_pydoc", haystack="pydoc", keys=4)
@register("niah_multikey_2", haystack="needle")
@register("niah_multikey_3", haystack="needle", key="uuid", value="uuid")
@register("niah_multivalue_pydoc", haystack="pydoc", values=4)
@register("niah_multiquery_pydoc", haystack="pydoc", queries=4)
class Needles(Task):
    """Facts `key is: value` in a haystack; those of the asked keys are wanted.

    Haystacks: `repeat` (one filler sentence again and again), `needle` (other needles), `pydoc`
    (Python's reference topics in the place of the essays of the original).
    """

    max_new_tokens = 128
    source = (
        "RULER; the largest haystack that fits; pydoc in place of essays, own sentence splitter"
    )

    def __init__(
        self,
        haystack: str,
        key: str = "word",
        value: str = "number",
        keys: int = 1,
        values: int = 1,
        queries: int = 1,
    ) -> None:
        self.haystack, self.key, self.value = haystack, key, value
        self.keys, self.values, self.queries = max(keys, queries), values, queries
        one = 16 if value == "number" else 48
        self.max_new_tokens = one * values * queries

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        def make(count: int) -> Sample:
            return self._make(tokenizer, count, random.Random(seed), depth)

        return fit(make, length, self.max_new_tokens, self.name)

    def _make(
        self,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        draw: random.Random,
        depth: float | None,
    ) -> Sample:
        kind = self.value
        pairs = [
            (KINDS[self.key](draw), [KINDS[self.value](draw) for _ in range(self.values)])
            for _ in range(self.keys)
        ]
        asked = pairs[: self.queries]
        needles = [
            (NEEDLE.format(kind=kind, key=k, value=v), (k, vs) in asked)
            for k, vs in pairs
            for v in vs
        ]
        singular = self.queries * self.values == 1
        names = [k for k, _ in asked]
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"
        gap = " " if self.haystack == "pydoc" else "\n"
        places = self._places(count, len(needles), draw, depth)
        at: dict[int, list[tuple[str, bool]]] = {}
        for where, needle in zip(places, needles, strict=True):
            at.setdefault(where, []).append(needle)
        text = Text().add(_singular(TEMPLATE.format(kind=kind), kind, singular))
        hay = self._hay(count, kind, draw)
        for index in range(count + 1):
            for sentence, wanted in at.get(index, []):
                text.add(sentence, fact=wanted).add(gap)
            if index < count:
                text.add(hay[index]).add(gap if index < count - 1 else "")
        text.question(_singular(QUESTION.format(kind=kind, query=query), kind, singular))
        text.add(_singular(PREFIX.format(kind=kind, query=query), kind, singular))
        return text.encode(tokenizer, tuple(v for _, vs in asked for v in vs))

    def _places(
        self, count: int, needles: int, draw: random.Random, depth: float | None
    ) -> list[int]:
        if depth is not None:
            first = round(depth * count)
            return [first, *[draw.randint(0, count) for _ in range(needles - 1)]]
        return [draw.randint(0, count) for _ in range(needles)]

    def _hay(self, count: int, kind: str, draw: random.Random) -> list[str]:
        if self.haystack == "repeat":
            return [GRASS] * count
        if self.haystack == "pydoc":
            sentences = prose()
            return [sentences[i % len(sentences)] for i in range(count)]
        return [
            NEEDLE.format(kind=kind, key=KINDS[self.key](draw), value=KINDS[self.value](draw))
            for _ in range(count)
        ]


def _singular(text: str, kind: str, singular: bool) -> str:
    """Make a text singular: the published template speaks of one needle where there is one."""
    if not singular:
        return text
    for plural, one in (("Some", "A"), ("are all", "is"), (" are", " is"), (f"{kind}s", kind)):
        text = text.replace(plural, one)
    return text
