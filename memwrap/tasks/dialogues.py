"""Conversations over many sessions: facts that are told, updated and taken back, and asked later."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from memwrap.tasks.told import NAMES, PLACES, SENTENCES, THINGS, plain_prose, shared_out

ONCE, UPDATED, TAKEN_BACK, NEVER = KINDS = ("told once", "updated", "taken back", "never told")
UPDATES = (
    "{name} took the {thing} to the {place}.",
    "The {thing} has been moved to the {place}.",
    "Now the {thing} is in the {place}.",
)
WITHDRAWALS = (
    "What I said about the {thing} was wrong; forget it.",
    "Please forget where the {thing} is, and do not tell anybody.",
)
QUESTION = "Where is the {thing}? Answer in a short sentence, and say so if you do not know."
BEGUN = "The {thing} is in the"
TALK = "I read this: {sentence}"
NOTED, FORGOTTEN, HEARD = "I will remember that.", "It is forgotten.", "I see."
TELLINGS = {ONCE: 1, UPDATED: 2, TAKEN_BACK: 2, NEVER: 0}


@dataclass(frozen=True)
class Said:
    """A turn of the user with the answer that it gets, the same whoever listens."""

    text: str
    reply: str


@dataclass(frozen=True)
class Asked:
    """A question at the end.

    Attributes:
        kind: one of `KINDS`.
        text, begun: the question, and how an answer that names a place begins.
        value: the place to be named, or the one that was taken back; None where none was told.
        old: the place before the newest one.
        others: places that were told of other things.
        turns, sessions: since what decides it was said; None where nothing was.
    """

    kind: str
    text: str
    begun: str
    value: str | None
    old: str | None
    others: tuple[str, ...]
    turns: int | None
    sessions: int | None


@dataclass(frozen=True)
class Dialogue:
    """Sessions of turns, and what is asked when all are over."""

    sessions: tuple[tuple[Said, ...], ...]
    questions: tuple[Asked, ...]


@dataclass
class _Subject:
    """A thing that facts are about: its kind, its places in order, and when it was spoken of."""

    kind: str
    name: str
    thing: str
    places: list[str]
    spoken: list[int]

    def turn(self, index: int, draw: random.Random) -> Said:
        """Make what is said of it at a turn."""
        self.spoken.append(index)
        first = len(self.spoken) == 1
        if not first and self.kind == TAKEN_BACK:
            return Said(draw.choice(WITHDRAWALS).format(thing=self.thing), FORGOTTEN)
        form = draw.choice(SENTENCES if first else UPDATES)
        place = self.places[len(self.spoken) - 1]
        return Said(form.format(name=self.name, thing=self.thing, place=place), NOTED)


def dialogue(seed: int, turns: int, *, each: int = 2, session: int = 8) -> Dialogue:
    """Make a conversation and its questions.

    What is told stands at drawn turns; between it stands prose. Names, things and prose are those
    that no recipe trains on (`told_facts`).

    Args:
        seed: everything random comes from it.
        turns: of the user, the questions not counted.
        each: things of every kind.
        session: turns of one session; the last may have fewer.

    Raises:
        ValueError: if the turns are too few for what is told, or `each` asks for too many things.
    """
    things, names = shared_out(THINGS, False), shared_out(NAMES, False)
    least, most = each * sum(TELLINGS.values()), len(things) // len(KINDS)
    if not 1 <= each <= most:
        raise ValueError(f"`each` is {each}; there are things for 1 to {most} of every kind.")
    if turns < least or session < 1:
        raise ValueError(
            f"{turns} turns in sessions of {session}: with {each} things of every kind at least "
            f"{least} turns are needed, in sessions of at least 1."
        )
    draw = random.Random(seed)
    subjects = _subjects(draw, each, names, things)
    order = [s for s in subjects for _ in range(TELLINGS[s.kind])]
    draw.shuffle(order)
    when = dict(zip(sorted(draw.sample(range(turns), len(order))), order, strict=True))
    used = {word for s in subjects for word in (s.thing, *s.places)}
    prose = _prose(draw, used)
    said = [
        when[index].turn(index, draw)
        if index in when
        else Said(TALK.format(sentence=prose[index % len(prose)]), HEARD)
        for index in range(turns)
    ]
    sessions = tuple(tuple(said[at : at + session]) for at in range(0, turns, session))
    questions = [_question(s, subjects, turns, session) for s in subjects]
    draw.shuffle(questions)
    return Dialogue(sessions, tuple(questions))


def _subjects(draw: random.Random, each: int, names: list[str], things: list[str]) -> list[_Subject]:
    count = each * len(KINDS)
    places = draw.sample(PLACES, 2 * count)
    drawn = zip(draw.sample(names, count), draw.sample(things, count), strict=True)
    return [
        _Subject(KINDS[n % len(KINDS)], name, thing, places[2 * n : 2 * n + 2], [])
        for n, (name, thing) in enumerate(drawn)
    ]


def _prose(draw: random.Random, used: set[str]) -> list[str]:
    """List sentences from a drawn place on, without those that name what is told."""
    text = " ".join(plain_prose(False))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 40 < len(s) < 240]
    plain = [s for s in sentences if not used & set(words(s))]
    first = draw.randrange(len(plain))
    return plain[first:] + plain[:first]


def _question(subject: _Subject, subjects: list[_Subject], turns: int, session: int) -> Asked:
    told = {ONCE: 1, UPDATED: 2, TAKEN_BACK: 1, NEVER: 0}
    own = subject.places[: told[subject.kind]]
    others = [p for s in subjects if s is not subject for p in s.places[: told[s.kind]]]
    last = subject.spoken[-1] if subject.spoken else None
    return Asked(
        subject.kind,
        QUESTION.format(thing=subject.thing),
        BEGUN.format(thing=subject.thing),
        own[-1] if own else None,
        own[0] if subject.kind == UPDATED else None,
        tuple(others),
        None if last is None else turns - last,
        None if last is None else -(-turns // session) - last // session,
    )


def words(text: str) -> list[str]:
    """List the words of a text in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


__all__ = ["KINDS", "NEVER", "ONCE", "TAKEN_BACK", "UPDATED", "Asked", "Dialogue", "Said", "dialogue",
           "words"]  # fmt: skip
