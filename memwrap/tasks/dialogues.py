"""Conversations over many sessions: what is told, updated and taken back, and asked at the end."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from memwrap.tasks.told import plain_prose

ONCE, UPDATED, TAKEN_BACK, NEVER = KINDS = ("told once", "updated", "taken back", "never told")


@dataclass(frozen=True)
class Topic:
    """Something that a user may tell of, with its value in `{}`.

    Attributes:
        told, updated, question: what the user says.
        about: it, as an indirect question of the user.
        begun: how an answer begins; the value follows.
        values: what it may be, single words that stand in no other topic.
    """

    told: str
    updated: str
    question: str
    about: str
    begun: str
    values: tuple[str, ...]


def _topic(told: str, updated: str, question: str, about: str, begun: str, values: str) -> Topic:
    return Topic(told, updated, question, about, begun, tuple(values.split()))


TOPICS = (
    _topic("My dog is called {}.", "My dog has a new name, {}.", "What is my dog called?",
           "what my dog is called", "Your dog is called", "Rex Bella Bruno Luna Max"),
    _topic("My sister lives in {}.", "My sister moved to {}.", "Where does my sister live?",
           "where my sister lives", "Your sister lives in", "Paris Rome Madrid Vienna Dublin"),
    _topic("My car is {}.", "I had my car painted {}.", "Which colour is my car?",
           "which colour my car is", "Your car is", "red blue green black white"),
    _topic("My swimming lesson is on {}.", "My swimming lesson was moved to {}.",
           "On which day is my swimming lesson?", "on which day my swimming lesson is",
           "Your swimming lesson is on", "Monday Tuesday Wednesday Thursday Friday"),
    _topic("My brother works as a {}.", "My brother has a new job as a {}.",
           "What does my brother work as?", "what my brother works as",
           "Your brother works as a", "teacher doctor baker farmer lawyer"),
    _topic("I like {} best of all food.", "By now I like {} best of all food.",
           "Which food do I like best?", "which food I like best",
           "The food that you like best is", "pizza rice soup cheese fish"),
    _topic("My daughter plays the {}.", "My daughter gave that up and plays the {} now.",
           "Which instrument does my daughter play?", "which instrument my daughter plays",
           "Your daughter plays the", "violin piano guitar flute trumpet"),
    _topic("The spare key is in the {}.", "I have put the spare key in the {} instead.",
           "Where is the spare key?", "where the spare key is", "The spare key is in the",
           "kitchen garage cellar garden office"),
    _topic("Our wedding is in {}.", "Our wedding was put off to {}.",
           "In which month is our wedding?", "in which month our wedding is",
           "Your wedding is in", "April June July August October"),
    _topic("I am allergic to {}.", "The doctors found that I am allergic to {} instead.",
           "What am I allergic to?", "what I am allergic to", "You are allergic to",
           "nuts milk eggs dust pollen"),
    _topic("My uncle collects {}.", "My uncle sold all that and collects {} now.",
           "What does my uncle collect?", "what my uncle collects", "Your uncle collects",
           "stamps coins clocks maps shells"),
    _topic("My son plays {}.", "My son changed his sport and plays {} now.",
           "Which sport does my son play?", "which sport my son plays", "Your son plays",
           "tennis football hockey golf rugby"),
    _topic("I am learning {}.", "I changed my course and am learning {} now.",
           "Which language am I learning?", "which language I am learning", "You are learning",
           "Spanish French German Italian Greek"),
    _topic("My neighbour keeps a {}.", "My neighbour gave it away and keeps a {} now.",
           "Which animal does my neighbour keep?", "which animal my neighbour keeps",
           "Your neighbour keeps a", "parrot rabbit snake goat horse"),
)  # fmt: skip
WITHDRAWALS = ("What I said was wrong, please forget {}.", "Please forget {}, and tell nobody.")
UNKNOWN, NOTED = "I do not know {}.", "I see. {} {}."
TALK = ("Tell me something.", "Go on.", "What else?", "Tell me more.", "And then?")
TURNED = {"my": "your", "our": "your", "i": "you", "am": "are"}
TELLINGS = {ONCE: 1, UPDATED: 2, TAKEN_BACK: 2, NEVER: 0}


@dataclass(frozen=True)
class Said:
    """A turn of the user with the answer that it gets, the same whoever listens."""

    text: str
    reply: str


@dataclass(frozen=True)
class Inquiry:
    """A question at the end.

    Attributes:
        kind: one of `KINDS`.
        text, begun: the question, and how an answer that names a value begins.
        value: to be named, or the one that was taken back; None where none was told.
        old: the value before the newest one.
        others: values that were told of other things.
        invented: what could be named where nothing was told.
        turns, sessions: since what decides it was said; None where nothing was.
    """

    kind: str
    text: str
    begun: str
    value: str | None
    old: str | None
    others: tuple[str, ...]
    invented: tuple[str, ...]
    turns: int | None
    sessions: int | None


@dataclass(frozen=True)
class Dialogue:
    """Sessions of turns, and what is asked when all are over."""

    sessions: tuple[tuple[Said, ...], ...]
    questions: tuple[Inquiry, ...]


@dataclass
class _Subject:
    """A topic of one conversation: its kind, its values in order, and when it was spoken of."""

    kind: str
    topic: Topic
    values: list[str]
    spoken: list[int]

    def turn(self, index: int, draw: random.Random) -> Said:
        """Make what is said of it at a turn."""
        self.spoken.append(index)
        first, topic = len(self.spoken) == 1, self.topic
        if not first and self.kind == TAKEN_BACK:
            return Said(draw.choice(WITHDRAWALS).format(topic.about), self.unknown())
        value = self.values[len(self.spoken) - 1]
        form = topic.told if first else topic.updated
        return Said(form.format(value), NOTED.format(topic.begun, value))

    def unknown(self) -> str:
        turned = [TURNED.get(word.lower(), word) for word in self.topic.about.split()]
        return UNKNOWN.format(" ".join(turned))

    def example(self) -> Said:
        """Make a question with its right answer."""
        known = f"{self.topic.begun} {self.values[0]}."
        return Said(self.topic.question, self.unknown() if self.kind == NEVER else known)

    def told(self) -> list[str]:
        return self.values[: {ONCE: 1, UPDATED: 2, TAKEN_BACK: 1, NEVER: 0}[self.kind]]


def dialogue(seed: int, turns: int, *, topics: int = 2, session: int = 8) -> Dialogue:
    """Make a conversation and its questions.

    What is told stands at drawn turns; between it stands prose. Sessions end with a question that
    is answered, about what the first turn told or what was never told: small models answer as they
    saw it done. The prose is a part that no recipe trains on (`told_facts`).

    Args:
        seed: everything random comes from it.
        turns: of the user, the questions not counted.
        topics: topics of every kind.
        session: turns of one session; the last may have fewer.

    Raises:
        ValueError: if the turns are too few for what is told, or `topics` asks for too many topics.
    """
    most = (len(TOPICS) - 2) // len(KINDS)
    if not 1 <= topics <= most:
        raise ValueError(f"`topics` is {topics}; there are topics for 1 to {most} of every kind.")
    if session < 3:
        raise ValueError(f"`session` is {session}; a session has at least 3 turns.")
    draw = random.Random(seed)
    *subjects, known, unknown = _subjects(draw, topics)
    said: dict[int, Said] = {0: known.turn(0, draw)}
    for number, last in enumerate(range(session - 1, turns, session)):
        said[last] = (known, unknown)[number % 2].example()
    order = [s for s in subjects for _ in range(TELLINGS[s.kind])]
    free = [index for index in range(turns) if index not in said]
    if len(free) < len(order):
        raise ValueError(
            f"{turns} turns in sessions of {session} have room for {len(free)} facts; {topics} "
            f"topics of every kind need {len(order)}."
        )
    draw.shuffle(order)
    told = zip(sorted(draw.sample(free, len(order))), order, strict=True)
    said |= {index: subject.turn(index, draw) for index, subject in told}
    prose = _prose(draw)
    for index in range(turns):
        if index not in said:
            said[index] = Said(draw.choice(TALK), prose[index % len(prose)])
    ordered = [said[index] for index in range(turns)]
    sessions = tuple(tuple(ordered[at : at + session]) for at in range(0, turns, session))
    questions = [_question(s, [*subjects, known], turns, session) for s in subjects]
    draw.shuffle(questions)
    return Dialogue(sessions, tuple(questions))


def _subjects(draw: random.Random, topics: int) -> list[_Subject]:
    """Draw topics of all kinds, one more that is told and one more that is not."""
    kinds = [*KINDS * topics, ONCE, NEVER]
    drawn = zip(kinds, draw.sample(TOPICS, len(kinds)), strict=True)
    return [_Subject(kind, topic, draw.sample(topic.values, 2), []) for kind, topic in drawn]


def _prose(draw: random.Random) -> list[str]:
    """List sentences from a drawn place on, without those that name a value."""
    values = {value.lower() for topic in TOPICS for value in topic.values}
    text = " ".join(plain_prose(False))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if 40 < len(s) < 240]
    plain = [s for s in sentences if values.isdisjoint(words(s))]
    first = draw.randrange(len(plain))
    return plain[first:] + plain[:first]


def _question(subject: _Subject, subjects: list[_Subject], turns: int, session: int) -> Inquiry:
    values, last = subject.told(), subject.spoken[-1] if subject.spoken else None
    return Inquiry(
        subject.kind,
        subject.topic.question,
        subject.topic.begun,
        values[-1] if values else None,
        values[0] if subject.kind == UPDATED else None,
        tuple(value for s in subjects if s is not subject for value in s.told()),
        subject.topic.values,
        None if last is None else turns - last,
        None if last is None else -(-turns // session) - last // session,
    )


def words(text: str) -> list[str]:
    """List the words of a text in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


__all__ = [
    "KINDS",
    "NEVER",
    "ONCE",
    "TAKEN_BACK",
    "TOPICS",
    "UPDATED",
    "Dialogue",
    "Inquiry",
    "Said",
    "Topic",
    "dialogue",
    "words",
]  # fmt: skip
