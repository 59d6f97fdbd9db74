"""RULER's variable tracking, common words and frequent words (Hsieh et al. 2024)."""

from __future__ import annotations

import random
import string
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from memwrap.tasks.base import Sample, Task, Text, fit, register
from memwrap.tasks.niah import words
from memwrap.tasks.passkey import GRASS

SHORT = 4096  # below this length RULER repeats fewer words


def _letters(draw: random.Random, size: int, letters: str) -> str:
    return "".join(draw.choice(letters) for _ in range(size))


@register("vt")
class VariableTracking(Task):
    """One chain of five variables, each assigned from the one before, in filler text."""

    max_new_tokens = 30
    source = "RULER; one worked example in front; seeded Python random in place of numpy's"
    HOPS = 4

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
            text = Text()
            example, names = self._one(Text(), 5, draw, 3, None)
            text.add(f"{example.text}{', '.join(names)}\n\n")
            text, names = self._one(text, count, draw, 5, depth)
            return text.encode(tokenizer, tuple(names))

        return fit(make, length, self.max_new_tokens, self.name)

    def _one(
        self, text: Text, count: int, draw: random.Random, size: int, depth: float | None
    ) -> tuple[Text, list[str]]:
        value = draw.randint(10_000, 99_998)
        names: list[str] = []
        while len(names) <= self.HOPS:
            name = _letters(draw, size, string.ascii_uppercase)
            names += [] if name in names else [name]
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        places = sorted(draw.randint(0, count) for _ in chain)
        if depth is not None:
            places = [max(p, round(depth * count)) for p in places]
        text.add(
            "Memorize and track the chain(s) of variable assignment hidden in the following "
            "text.\n\n"
        )
        for index in range(count + 1):
            for where, link in zip(places, chain, strict=True):
                if where == index:
                    text.add(f"{link}.", fact=True).add("\n")
            if index < count:
                text.add(f"{GRASS}\n")
        text.question(
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above. Answer: According to the chain(s) of variable assignment in the text above, "
            f"{self.HOPS + 1} variables are assgined the value {value}, they are: "
        )
        return text, names


@register("cwe")
class CommonWords(Task):
    """A numbered list of words: ten come often, the rest seldom."""

    max_new_tokens = 120
    source = "RULER; one worked example in front"

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        often, seldom = (30, 3) if length >= SHORT else (6, 1)
        every = [*words()[0], *words()[1]]

        def make(count: int) -> Sample:
            draw = random.Random(seed)
            chosen = draw.sample(every, len(every))
            shown = (40, 10, 3) if length >= SHORT else (20, 3, 1)
            text = Text()
            example = self._one(Text(), chosen[: shown[0]], shown[1], shown[2])
            text.add(example.text + _listed(chosen[:10]) + "\n\n")
            rest = chosen[shown[0] :]
            words = [rest[i % len(rest)] for i in range(count + 10)]
            self._one(text, words, often, seldom)
            return text.encode(tokenizer, tuple(words[:10]), " " + _listed(words[:10]))

        return fit(make, length, self.max_new_tokens, self.name)

    def _one(self, text: Text, chosen: list[str], often: int, seldom: int) -> Text:
        shown = chosen[:10] * often + chosen[10:] * seldom
        random.Random(42).shuffle(shown)
        text.add(
            "Below is a numbered list of words. In these words, some appear more often than "
            "others. Memorize the ones that appear most often.\n"
        )
        text.add(" ".join(f"{i}. {w}" for i, w in enumerate(shown, 1)), fact=True)
        return text.question(
            "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
            "words that appear most often in the list are:"
        )


def _listed(chosen: list[str]) -> str:
    return " ".join(f"{i}. {w}" for i, w in enumerate(chosen, 1))


@register("fwe")
class FrequentWords(Task):
    """Coded text whose words follow a zeta distribution: the second to fourth commonest."""

    max_new_tokens = 50
    source = "RULER; exponent 2, words of six letters"

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        *,
        depth: float | None = None,
    ) -> Sample:
        size = max(4, length // 50)

        def make(count: int) -> Sample:
            draw = random.Random(seed)
            drawn: set[str] = set()
            while len(drawn) < size:
                drawn.add(_letters(draw, 6, string.ascii_lowercase))
            vocabulary = sorted(drawn)
            random.Random(42).shuffle(vocabulary)
            vocabulary[0] = "..."
            # zeta(2) = pi^2 / 6; one more occurrence of the first four keeps their order apart.
            counts = [int(count * 0.607927 / (k + 1) ** 2) for k in range(size)]
            counts = [c + max(0, 4 - k) for k, c in enumerate(counts)]
            shown = [w for w, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
            draw.shuffle(shown)
            text = Text().add(
                "Read the following coded text and track the frequency of each coded word. Find "
                "the three most frequently appeared coded words. "
            )
            text.add(" ".join(shown), fact=True)
            text.question(
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
                "are the three most frequently appeared words in the above coded text? Answer: "
                "According to the coded text above, the three most frequently appeared words are:"
            )
            return text.encode(tokenizer, tuple(vocabulary[1:4]))

        return fit(make, length, self.max_new_tokens, self.name)
