"""What the demo reads: the text of Python's own documentation, which every installation carries,
with invented facts in it, and the questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memwrap.tasks.invented import FACTS, Fact, depths, found, prose, question


@dataclass(frozen=True)
class Parts:
    """A document in parts, each of which ends where the demo asks.

    Attributes:
        texts: the parts; a document as long as `lengths[n]` is the first `n + 1` of them.
        lengths: tokens of these documents, about.
        facts: of each length: its facts, in the middle of equal shares of the document.
    """

    texts: list[str]
    lengths: tuple[int, ...]
    facts: list[tuple[Fact, ...]]


def parts(tokenizer: Any, lengths: tuple[int, ...]) -> Parts:
    """Plant the facts of every length between the sentences of one document.

    Args:
        tokenizer: counts.
        lengths: where it is asked, from the shortest to the whole.
    """
    total = lengths[-1]
    ids = tokenizer(prose(), add_special_tokens=False, verbose=False)["input_ids"][:total]
    sentences = tokenizer.decode(ids).split(". ")
    facts = [FACTS[index :: len(lengths)] for index in range(len(lengths))]
    cuts = [round(length / total * len(sentences)) for length in lengths]
    places: list[tuple[int, str]] = []
    for cut, group in zip(cuts, facts, strict=True):
        places += [(round(depth * cut), fact.sentence.rstrip(".")) for depth, fact in
                   zip(depths(len(group)), group, strict=True)]  # fmt: skip
    texts = []
    for begin, end in zip([0, *cuts], cuts, strict=False):
        part = sentences[begin:end]
        inside = sorted(((n, s) for n, s in places if begin <= n < end), reverse=True)
        for place, sentence in inside:
            part.insert(place - begin, sentence)
        texts.append(". ".join(part) + ".")
    return Parts(texts, lengths, facts)


__all__ = ["FACTS", "Fact", "Parts", "depths", "found", "parts", "prose", "question"]
