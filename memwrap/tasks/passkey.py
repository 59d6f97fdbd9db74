"""Passkey retrieval as Landmark attention published it (Mohtashami and Jaggi 2023, 4.2)."""

from __future__ import annotations

import random
import re

from transformers import PreTrainedTokenizerBase

from memwrap.tasks.base import Sample, Task, Text, fit, place, register

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BEFORE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)


@register("passkey")
class Passkey(Task):
    """A number between 1 and 50,000 in repeated filler text; its first number is the answer."""

    max_new_tokens = 10
    source = "Landmark attention; filler as long as fits, seeded"

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
            key = draw.randint(1, 50_000)
            filler = " ".join([GRASS] * (count // len(GRASS) + 1))
            first = place(count, depth, draw)
            text = Text().add(f"{BEFORE}\n{filler[:first]}\n")
            text.add(f"The pass key is {key}. Remember it. {key} is the pass key.", fact=True)
            text.add(f"\n{filler[: count - first]}\n")
            text.question("What is the pass key? The pass key is")
            return text.encode(tokenizer, (str(key),))

        return fit(make, length, self.max_new_tokens, self.name)

    def score(self, text: str, references: tuple[str, ...]) -> float:
        """Score an answer: 1 if its first number is the key."""
        digits = re.search(r"\d+", text)
        return float(digits is not None and int(digits.group()) == int(references[0]))
