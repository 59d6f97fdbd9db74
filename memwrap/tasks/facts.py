"""Small worlds told in sentences among other text, in the manner of bAbI (own sentences, own
simulation: these are not the bAbI tasks, and not BABILong)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from memwrap.tasks.base import Sample, Task, Text, fit, register
from memwrap.tasks.niah import prose

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")


@dataclass
class World:
    """A small world: who and what is where, and which sentences say so.

    Attributes:
        told: the sentences so far.
        room, holder: place of a person; who has a thing (None: nobody).
        why: for a person's or thing's place, the sentences that make it known.
        past: rooms that a thing was in, in order, with the sentences that make each known.
    """

    told: list[str] = field(default_factory=list)
    room: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    why: dict[str, list[int]] = field(default_factory=dict)
    past: dict[str, list[tuple[str, list[int]]]] = field(default_factory=dict)

    def tell(self, sentence: str) -> int:
        self.told.append(sentence)
        return len(self.told) - 1

    def move(self, person: str, room: str, verb: str) -> None:
        index = self.tell(f"{person} {verb} the {room}.")
        self.room[person], self.why[person] = room, [index]
        for thing, holder in self.holder.items():
            if holder == person:
                self._found(thing, room, [self.why[f"{thing} taken"][0], index])

    def take(self, person: str, thing: str) -> None:
        index = self.tell(f"{person} got the {thing}.")
        self.holder[thing], self.why[f"{thing} taken"] = person, [index]
        self._found(thing, self.room[person], [index, *self.why[person]])

    def drop(self, thing: str) -> None:
        person = self.holder.pop(thing)
        index = self.tell(f"{person} dropped the {thing}.")
        self._found(thing, self.room[person], [index, *self.why[person]])

    def _found(self, thing: str, room: str, why: list[int]) -> None:
        trail = self.past.setdefault(thing, [])
        if trail and trail[-1][0] == room:
            trail[-1] = (room, why)
        else:
            trail.append((room, why))


def simulate(draw: random.Random, events: int, things: bool) -> World:
    """Let people walk about, and take and drop things, until `events` sentences are told."""
    world = World()
    while len(world.told) < events:
        person = draw.choice(PEOPLE)
        free = [t for t in THINGS if t not in world.holder]
        held = [t for t, h in world.holder.items() if h == person]
        kind = draw.random() if things and person in world.room else 0.0
        if kind < 0.5:
            rooms = [r for r in ROOMS if r != world.room.get(person)]
            world.move(person, draw.choice(rooms), draw.choice(MOVES))
        elif kind < 0.8 and free:
            world.take(person, draw.choice(free))
        elif held:
            world.drop(draw.choice(held))
    return world


@register("babi_like_1", facts=1)
@register("babi_like_2", facts=2)
@register("babi_like_3", facts=3)
@register("babi_like_4", facts=4)
@register("babi_like_5", facts=5)
class BabiLike(Task):
    """Questions about a small world, its sentences strewn over other text.

    1: where a person is. 2: where a thing is. 3: where a thing was before its place. 4: who is in
    a room now (the last who came). 5: how many things a person carries.
    """

    max_new_tokens = 8
    source = "own simulation in bAbI's manner among Python's reference topics; not BABILong"

    def __init__(self, facts: int) -> None:
        self.facts = facts

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        draw = random.Random(seed)
        question, answer, world, needed = self._ask(draw)
        sentences = prose()
        start, at = draw.randrange(len(sentences)), draw.random()

        def make(count: int) -> Sample:
            places = random.Random(at)
            strewn = sorted(places.randint(0, count) for _ in world.told)
            if depth is not None:
                pivot = round(depth * count)
                strewn = sorted(min(pivot, s) for s in strewn)
            text = Text()
            told = 0
            for index in range(count + 1):
                while told < len(strewn) and strewn[told] == index:
                    text.add(world.told[told], fact=told in needed).add(" ")
                    told += 1
                if index < count:
                    text.add(sentences[(start + index) % len(sentences)]).add(" ")
            text.question(f"Question: {question} Answer:")
            return text.encode(tokenizer, (answer,))

        return fit(make, length, self.max_new_tokens, self.name)

    def _ask(self, draw: random.Random) -> tuple[str, str, World, list[int]]:
        while True:  # until the world has what the question is about
            world = simulate(draw, 6 + 4 * self.facts, things=self.facts in (2, 3, 5))
            asked = self._question(draw, world)
            if asked is not None:
                question, answer, needed = asked
                return question, answer, world, needed

    def _question(self, draw: random.Random, world: World) -> tuple[str, str, list[int]] | None:
        person = draw.choice(sorted(world.room))
        if self.facts == 1:
            return f"Where is {person}?", world.room[person], world.why[person]
        if self.facts == 4:
            room = draw.choice(sorted(set(world.room.values())))
            people = [p for p, r in world.room.items() if r == room]
            last = max(people, key=lambda p: world.why[p])
            return f"Who came last to the {room}?", last, world.why[last]
        if self.facts == 5:
            held = [t for t, h in world.holder.items() if h == person]
            why = [world.why[f"{t} taken"][0] for t in held]
            number = ("no", "one", "two", "three")[len(held)]
            return (f"How many things does {person} carry?", number, why) if held else None
        trails = {
            t: trail for t, trail in sorted(world.past.items()) if len(trail) >= self.facts - 1
        }
        if not trails:
            return None
        thing = draw.choice(sorted(trails))
        room, why = trails[thing][-1]
        if self.facts == 2:
            return f"Where is the {thing}?", room, why
        before, earlier = trails[thing][-2]
        return f"Where was the {thing} before the {room}?", before, [*earlier, *why]

    def score(self, text: str, references: tuple[str, ...]) -> float:
        """Score an answer: 1 if its first word that could be one is right."""
        known = {*PEOPLE, *ROOMS, "no", "one", "two", "three"}
        lower = {k.lower() for k in known}
        words = [w.strip(".,;:!?\"'").lower() for w in text.split()]
        return float(next((w for w in words if w in lower), "") == references[0].lower())
