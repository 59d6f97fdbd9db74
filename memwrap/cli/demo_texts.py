"""What the demo reads: the text of Python's own documentation, which every installation carries,
with invented facts in it, and the questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memwrap.tasks.invented import FACTS, FURTHER, Fact, depths, found, prose, question


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
        lengths: where it is asked, from the shortest to the whole, facts included.
    """
    usual = min(len(lengths), 3)
    longer = len(lengths) - usual
    facts = [FACTS[index::usual] for index in range(usual)]
    facts += [FURTHER[index::longer] for index in range(longer)]
    planted = [fact for group in facts for fact in group]
    told = sum(len(tokenizer(fact.sentence)["input_ids"]) for fact in planted) / len(planted)
    amounts = []  # of prose; a text that facts alone would fill is longer than it is called
    for length in lengths:
        shares = (len(f) * min(1, length / n) for n, f in zip(lengths, facts, strict=True))
        amounts.append(max(length - told * sum(shares), length / 2))
    count = round(amounts[-1])
    ids = tokenizer(prose(), add_special_tokens=False, verbose=False)["input_ids"][:count]
    sentences = tokenizer.decode(ids).split(". ")
    cuts = [round(amount / amounts[-1] * len(sentences)) for amount in amounts]
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
