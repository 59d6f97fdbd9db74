"""The texts of the leaderboard: prose with invented facts in it, and the facts' questions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from memwrap.chat.turns import SEPARATOR, Turns
from memwrap.data.documents import encode, load_documents
from memwrap.tasks.invented import FACTS, Fact, depths, prose, question


@dataclass(frozen=True)
class Asked:
    """A question as it follows a text, with the answer behind it.

    Attributes:
        ids: the rest of the turn, the beginning of the answer and the answer.
        count: how many of them are the answer.
        depth: where in the text the fact stands, from 0 to 1.
    """

    ids: list[int]
    count: int
    depth: float


@dataclass(frozen=True)
class Exam:
    """A text `ids` in an open turn of the model's chat, and what is asked about it."""

    ids: list[int]
    asked: tuple[Asked, ...]


def exams(
    tokenizer: Any, texts: int, tokens: int, facts: int, seed: int, documents: str | None = None
) -> list[Exam]:
    """Plant facts in consecutive stretches of prose.

    Args:
        tokenizer: the model's, with a chat template or without.
        texts, tokens: how many texts, and of how many tokens each, the facts not counted.
        facts: in each text, none twice over all of them.
        seed: which facts.
        documents: of `load_documents`; None for the chapters of Python's reference.

    Raises:
        ValueError: for more facts or tokens than there are.
    """
    if texts * facts > len(FACTS):
        raise ValueError(
            f"{texts} texts with {facts} facts need {texts * facts} facts; there are {len(FACTS)}. "
            "Set fewer `texts` or `facts`."
        )
    whole = prose() if documents is None else _joined(documents)
    ids = encode(tokenizer, whole, special=False)
    if len(ids) < texts * tokens:
        raise ValueError(
            f"The documents have {len(ids):,} tokens; {texts} texts of {tokens:,} need "
            f"{texts * tokens:,}. Set fewer `texts` or `tokens`."
        )
    drawn = random.Random(seed).sample(FACTS, len(FACTS))
    stretches = [ids[n * tokens : (n + 1) * tokens] for n in range(texts)]
    return [
        _exam(tokenizer, tokenizer.decode(part), drawn[n * facts : (n + 1) * facts])
        for n, part in enumerate(stretches)
    ]


def _joined(documents: str) -> str:
    return "\n\n".join(" ".join(d.text.split()) for d in load_documents(documents))


def _exam(tokenizer: Any, text: str, facts: list[Fact]) -> Exam:
    sentences, places = text.strip().split(". "), depths(len(facts))
    for fact, depth in reversed(list(zip(facts, places, strict=True))):
        sentences.insert(round(depth * len(sentences)), fact.sentence.rstrip("."))
    document = ". ".join(sentences).rstrip(".") + "."
    turns = Turns(tokenizer)
    lead = turns.lead() if turns.present else ""
    ids = encode(tokenizer, lead + document, special=not turns.present)
    asked = []
    for fact, depth in zip(facts, places, strict=True):
        begun = SEPARATOR + _turn(turns, fact, lead) + fact.sentence.partition(fact.answer)[0]
        before = turns.encode(begun.rstrip())
        all_ids = turns.encode(f"{begun.rstrip()} {fact.answer}")
        asked.append(Asked(all_ids, len(all_ids) - len(before), depth))
    return Exam(ids, tuple(asked))


def _turn(turns: Turns, fact: Fact, lead: str) -> str:
    """Write what follows the document: the question, and what opens the answer."""
    if not turns.present:
        return f"{question(fact)}\nAnswer: "
    return turns.text([{"role": "user", "content": question(fact)}])[len(lead) :]


__all__ = ["Asked", "Exam", "exams"]
