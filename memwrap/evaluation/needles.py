"""Finding one number in a long text: passkey retrieval and two of RULER's tasks, made offline.

`passkey` is the task of Landmark attention (Mohtashami and Jaggi 2023), `single_1` and
`multikey_2` are those of RULER (Hsieh et al. 2024) under their names there; the words of their
keys are memwrap's own short lists. Texts have any length in the tokens of any tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TASKS = ("passkey", "single_1", "multikey_2")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = (
    "amber brave calm dusty eager faint gentle hollow idle jolly keen lively mellow narrow odd "
    "plain quiet rapid silent tidy upbeat vivid warm young zesty"
)
NOUNS = (
    "anchor basket candle desert engine forest garden harbor island jacket kettle ladder meadow "
    "needle orchard pencil quarry ribbon saddle tunnel umbrella valley window yard zipper bridge "
    "castle drum eagle feather glove hammer"
)


@dataclass
class NeedleSample:
    """One text and the question at its end.

    Attributes:
        ids: `(T,)`, the text, the question and the right answer.
        question: where the question begins; `ids[:question]` is what is to be remembered.
        answer: where the answer begins; it reaches to the end.
        needle: first and last (exclusive) token of the sentence that is asked for.
        expected: the answer as text.
    """

    ids: Tensor
    question: int
    answer: int
    needle: tuple[int, int]
    expected: str


@dataclass
class NeedleTask:
    """Makes samples of a task.

    Attributes:
        name: one of `TASKS`.
        tokenizer: of the model; lengths are counted in its tokens.
    """

    name: str
    tokenizer: Any
    _fillers: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"The task is {self.name!r}; allowed: {', '.join(TASKS)}.")

    def sample(
        self, length: int, depth: float | None = None, generator: random.Random | None = None
    ) -> NeedleSample:
        """Draw a sample.

        Args:
            length: tokens at most, question and answer included; the text is as long as fits.
            depth: where the needle stands, 0 (at the beginning) to 1 (right before the
                question); None: anywhere.
            generator: all randomness comes from it (default: seed 0).

        Raises:
            ValueError: for a depth outside 0 to 1, or a length in which not even the needle fits.
        """
        generator = generator or random.Random(0)
        depth = generator.random() if depth is None else depth
        if not 0 <= depth <= 1:
            raise ValueError(f"`depth` is {depth}; it must be between 0 and 1.")
        seed = generator.getrandbits(64)  # one needle, however often the length is tried
        if length not in self._fillers:
            self._fillers[length] = self._fitting(length, depth, seed)
        filler = self._fillers[length]
        sample = self._sample(filler, depth, seed)
        while len(sample.ids) > length and filler:
            filler -= max(1, min(filler // 100, len(sample.ids) - length))
            sample = self._sample(filler, depth, seed)
        if len(sample.ids) > length:
            raise ValueError(
                f"`length` is {length}; the shortest {self.name} text has {len(sample.ids)} tokens."
            )
        return sample

    def _fitting(self, length: int, depth: float, seed: int) -> int:
        """The largest amount of filler with which a text has at most `length` tokens."""
        low, high = 0, 1
        while len(self._sample(high, depth, seed).ids) <= length:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(self._sample(middle, depth, seed).ids) <= length
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _sample(self, filler: int, depth: float, seed: int) -> NeedleSample:
        make = self._passkey if self.name == "passkey" else self._ruler
        before, needle, after, question, expected = make(filler, depth, random.Random(seed))
        full = self._ids(before + needle + after + question + " " + expected)
        ends = [
            before,
            before + needle,
            before + needle + after,
            before + needle + after + question,
        ]
        first, last, asked, answer = (_common(self._ids(text), full) for text in ends)
        return NeedleSample(
            torch.tensor(full), asked, answer, (first, max(last, first + 1)), expected
        )

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin: Any = getattr(self.tokenizer, "bos_token_id", None)
        marked = begin is not None and self.tokenizer("a")["input_ids"][:1] == [begin]
        return [begin, *ids] if marked else list(ids)

    @staticmethod
    def _passkey(filler: int, depth: float, generator: random.Random) -> tuple[str, ...]:
        """`filler` characters of irrelevant text around the needle, each side from the start."""
        key = str(generator.randint(1, 50000))
        text = " ".join([FILLER] * (filler // len(FILLER) + 1))
        place = round(depth * filler)
        head = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.\n"
        )
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        after = f"\n{text[: filler - place]}"
        question = "\nWhat is the pass key? The pass key is"
        return f"{head}{text[:place]}\n", needle, after, question, key

    def _ruler(self, filler: int, depth: float, generator: random.Random) -> tuple[str, ...]:
        """`filler` lines around the needle: all alike, or needles of other keys."""
        asked = _key(generator)
        lines = [FILLER] * filler
        if self.name == "multikey_2":
            lines = []
            while len(lines) < filler:
                other = _key(generator)
                if other != asked:
                    lines.append(_needle(other, generator.randint(1_000_000, 9_999_999)))
        number = str(generator.randint(1_000_000, 9_999_999))
        place = round(depth * filler)
        head = (
            "A special magic number is hidden within the following text. Make sure to memorize it. "
            "I will quiz you about the number afterwards.\n"
        )
        before = "".join(f"{line}\n" for line in lines[:place])
        after = "".join(f"\n{line}" for line in lines[place:])
        question = (
            f"\nWhat is the special magic number for {asked} mentioned in the provided text? The "
            f"special magic number for {asked} mentioned in the provided text is"
        )
        return head + before, _needle(asked, number), after, question, number


def _key(generator: random.Random) -> str:
    return f"{generator.choice(ADJECTIVES.split())}-{generator.choice(NOUNS.split())}"


def _needle(key: str, value: int | str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _common(part: list[int], full: list[int]) -> int:
    """Tokens with which both begin: where a text's own end lies in the tokens of a longer one."""
    for index, (a, b) in enumerate(zip(part, full, strict=False)):
        if a != b:
            return index
    return min(len(part), len(full))
