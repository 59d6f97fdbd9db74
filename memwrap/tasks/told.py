"""Facts told in single sentences among other text, each in one segment, and a question later."""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from memwrap.tasks.base import FIRST_SEED, Sample, Span, Task, register
from memwrap.tasks.niah import prose

SENTENCES = (
    "{name} left the {thing} in the {place}.",
    "{name} put the {thing} in the {place}.",
    "The {thing} of {name} is in the {place}.",
    "{name} has hidden the {thing} in the {place}.",
    "{name}'s {thing} lies in the {place}.",
    "{name} forgot the {thing} in the {place}.",
    "{name} keeps the {thing} in the {place}.",
    "The {thing} that {name} bought is in the {place}.",
)
QUESTION = "\nQuestion: Where is the {thing}? Answer: the"
NAMES = [
    "Simon",
    "Mary",
    "John",
    "Daniel",
    "Sandra",
    "Peter",
    "Anna",
    "Paul",
    "Laura",
    "David",
    "Emma",
    "Mark",
    "Julia",
    "Thomas",
    "Sarah",
    "Robert",
    "Helen",
    "Martin",
    "Alice",
    "George",
    "Lucy",
    "Henry",
    "Clara",
    "Frank",
    "Oscar",
    "Grace",
    "Victor",
    "Samuel",
    "Diana",
    "Arthur",
    "Ruth",
    "Philip",
    "Jane",
    "Walter",
    "Rosa",
    "Edward",
    "Maria",
    "Charles",
    "Eva",
    "Hugo",
    "Olivia",
    "Leo",
    "Sophie",
    "Ralph",
    "Linda",
    "Felix",
    "Karen",
    "Oliver",
    "Amy",
    "Adam",
    "Kate",
    "Max",
    "Ellen",
    "Jack",
    "Susan",
    "Harry",
    "Lisa",
    "Tom",
    "Carl",
    "Vera",
    "Bruno",
    "Judy",
    "Alan",
    "Nina",
]
THINGS = [
    "compass",
    "lamp",
    "violin",
    "camera",
    "hammer",
    "umbrella",
    "wallet",
    "kettle",
    "basket",
    "guitar",
    "blanket",
    "mirror",
    "ladder",
    "telescope",
    "helmet",
    "bottle",
    "candle",
    "clock",
    "drum",
    "envelope",
    "flute",
    "glove",
    "hat",
    "jacket",
    "key",
    "knife",
    "map",
    "necklace",
    "painting",
    "pen",
    "phone",
    "pillow",
    "plate",
    "radio",
    "ring",
    "rope",
    "saw",
    "shoe",
    "spoon",
    "ticket",
    "towel",
    "trumpet",
    "vase",
    "watch",
    "whistle",
]
PLACES = [
    "garage",
    "kitchen",
    "garden",
    "attic",
    "basement",
    "office",
    "library",
    "church",
    "school",
    "hospital",
    "museum",
    "hotel",
    "station",
    "forest",
    "park",
    "barn",
    "bathroom",
    "bedroom",
    "theater",
    "stadium",
    "castle",
    "factory",
    "tower",
    "cave",
    "shop",
    "boat",
    "train",
    "cabin",
    "desert",
    "lake",
]
HELD_BACK = 4
"""One in so many names, things and sentences of prose is kept for evaluation."""


def shared_out(items: list[str], training: bool) -> list[str]:
    """Take the part that training draws from, or the part that evaluation does."""
    return [x for i, x in enumerate(items) if (i % HELD_BACK == 0) != training]


@cache
def plain_prose(training: bool) -> list[str]:
    """List paragraphs of twenty sentences without signs of code, from Python's reference topics."""
    plain = [s for s in prose() if len(s) > 40 and not re.search(r"[^\w\s.,;:'’()\"?!-]|__", s)]
    paragraphs = [" ".join(plain[i : i + 20]) for i in range(0, len(plain), 20)]
    return shared_out(paragraphs, training)


@register("told_facts", others=0)
@register("told_facts_5", others=4)
class ToldFacts(Task):
    """The place of a thing, told once; `others` more facts of other things stand elsewhere.

    The text is cut into blocks of `block` tokens, the length of a memory's segment, and a fact lies
    inside one block; the last block ends with the question. Seeds of training and of evaluation
    draw from different names, things and prose; places and forms of the sentence are the same.
    """

    max_new_tokens = 2
    ends = False
    source = "own; facts in blocks of 32 tokens among Python's reference topics"

    def __init__(self, others: int, block: int = 32) -> None:
        self.others, self.block = others, block
        self._streams: dict[Any, list[tuple[list[int], list[int]]]] = {}

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        draw, training = random.Random(seed), seed >= FIRST_SEED
        facts = self._facts(draw, training)
        thing, place = facts[0][1:]
        asked = _ids(tokenizer, QUESTION.format(thing=thing))
        answer = _ids(tokenizer, f" {place}")
        blocks = (length + 1) // self.block - 1  # in front of the question's, which stays open
        told = [_ids(tokenizer, " " + sentence) for sentence, *_ in facts]
        longest = max(map(len, [*told, asked + answer]))
        if blocks < len(facts) or longest >= self.block:
            least = (len(facts) + 1) * self.block
            raise ValueError(f"{self.name} needs at least {least} tokens; got length {length}.")
        at = round(depth * (blocks - 1)) if depth is not None else draw.randrange(blocks)
        free = [index for index in range(blocks) if index != at]
        elsewhere = draw.sample(free, self.others)
        where = {at: 0} | {index: number for number, index in enumerate(elsewhere, 1)}
        filler = self._filler(tokenizer, draw, training, blocks * self.block + self.block)
        ids: list[int] = []
        spans: list[Span] = []
        for index in range(blocks):
            fact = told[where[index]] if index in where else []
            before, after = filler.around(self.block - len(fact), bool(fact))
            ids += before
            if index == at:
                spans = [(len(ids), len(ids) + len(fact))]
            ids += fact + after
        rest, _ = filler.around(self.block - 1 - len(asked) - len(answer), False)
        ids += rest
        return Sample(ids + asked, [spans], len(ids), answer=tuple(answer), references=(place,))

    def _facts(self, draw: random.Random, training: bool) -> list[tuple[str, str, str]]:
        """Draw sentences with their thing and place, all different."""
        count = self.others + 1
        names, things = (
            draw.sample(shared_out(words, training), count) for words in (NAMES, THINGS)
        )
        places = draw.sample(PLACES, count)
        return [
            (draw.choice(SENTENCES).format(name=n, thing=t, place=p), t, p)
            for n, t, p in zip(names, things, places, strict=True)
        ]

    def _filler(
        self, tokenizer: PreTrainedTokenizerBase, draw: random.Random, training: bool, count: int
    ) -> _Filler:
        """Take prose that goes on for `count` tokens from a drawn place."""
        key = (tokenizer, training)
        if key not in self._streams:
            self._streams[key] = [_marked(tokenizer, text) for text in plain_prose(training)]
        paragraphs = self._streams[key]
        first = draw.randrange(len(paragraphs))
        ids: list[int] = []
        ends: list[int] = []
        while len(ids) < count:
            more, marks = paragraphs[first % len(paragraphs)]
            ends += [len(ids) + mark for mark in marks]
            ids, first = ids + more, first + 1
        return _Filler(ids, ends, draw)

    def score(self, text: str, references: tuple[str, ...]) -> float:
        """Score an answer: 1 if it begins with the place."""
        return float(text.strip().lower().startswith(references[0].lower()))


class _Filler:
    """Prose that is used up in pieces, and where its sentences end."""

    def __init__(self, ids: list[int], ends: list[int], draw: random.Random) -> None:
        self.ids, self.ends, self.draw, self.used = ids, ends, draw, 0

    def around(self, count: int, cut: bool) -> tuple[list[int], list[int]]:
        """Take the next `count` tokens, with `cut` parted at the end of a sentence if one ends
        there."""
        start, end = self.used, self.used + count
        self.used = end
        marks = [mark for mark in self.ends if start <= mark <= end] if cut else []
        at = self.draw.choice(marks) if marks else (start if cut else end)
        return self.ids[start:at], self.ids[at:end]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _marked(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Encode a paragraph, and find the columns behind which a sentence ends."""
    ids: list[int] = []
    ends: list[int] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        ids += _ids(tokenizer, " " + sentence)
        ends.append(len(ids))
    return ids, ends
