"""What is still known of conversations over many sessions, by their number of turns."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memwrap.evaluation.controls import (
    FULL,
    MEMORY,
    OFF,
    SINKS,
    TRUNCATED,
    WINDOW,
    own_context,
)
from memwrap.evaluation.listeners import (
    NEW_TOKENS,
    Listener,
    Remembering,
    Rereading,
    bytes_per_token,
)
from memwrap.evaluation.measure import Costs
from memwrap.evaluation.saved_result import SavedResult
from memwrap.evaluation.suite import wilson
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.tasks.dialogues import (
    NEVER,
    ONCE,
    TAKEN_BACK,
    UPDATED,
    Dialogue,
    Inquiry,
    dialogue,
    words,
)

READERS = (MEMORY, OFF, TRUNCATED, WINDOW, FULL)
MEASURES = (
    (ONCE, "right", "told once: named"),
    (ONCE, "likeliest", "told once: likeliest"),
    (UPDATED, "right", "updated: the newest named"),
    (UPDATED, "old", "updated: the old one named instead"),
    (UPDATED, "likeliest", "updated: the newest likeliest"),
    (TAKEN_BACK, "right", "taken back: not named"),
    (TAKEN_BACK, "likeliest", "taken back: still likeliest"),
    (NEVER, "right", "never told: nothing is named"),
)
"""Of a kind of question, what is counted, and what it is called."""


@dataclass(frozen=True)
class Outcome:
    """One question and what became of it.

    Attributes:
        turns, number: of the conversation: how long, and which.
        curve, kind: who answered, and what was asked.
        right: the newest value is named; the one that was taken back is not; of what was never
            told no value is named, its own or one told of something else.
        old: the old value is named, and the newest is not.
        other: a value that was told of something else is named.
        likeliest: all tokens of the newest value (of one taken back: of that) are greedy's after
            the beginning of an answer; None where none was told.
        distance, sessions: since what decides it was said.
        answer: what was said.
    """

    turns: int
    number: int
    curve: str
    kind: str
    right: bool
    old: bool
    other: bool
    likeliest: bool | None
    distance: int | None
    sessions: int | None
    answer: str


@dataclass
class ConversationsResult(SavedResult):
    """All outcomes, and what they were measured with.

    Attributes:
        model, seed, dialogues, topics, session: as `evaluate_conversations` takes them.
        outcomes: one for each question and reader.
        state_bytes, tokens: by number of turns, means: bytes of the memory at the end, and tokens
            that take as many in the backbone's cache (what "truncated" and "window" may see).
        seconds: by reader; for the memory, of hearing, saving and loading too.
    """

    format: ClassVar[str] = "memwrap-conversations"
    records: ClassVar[dict[str, type]] = {"outcomes": Outcome}

    model: str
    seed: int
    dialogues: int
    topics: int
    session: int
    outcomes: list[Outcome] = field(default_factory=list)
    state_bytes: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def turns(self) -> list[int]:
        """List the numbers of turns."""
        return sorted({o.turns for o in self.outcomes})

    def curves(self) -> list[str]:
        """List who answered."""
        return list(dict.fromkeys(o.curve for o in self.outcomes))

    def count(self, turns: int, curve: str, kind: str, counted: str) -> tuple[int, int]:
        """Count the questions of a kind of which something is true, and all of them."""
        values = [
            getattr(o, counted)
            for o in self.outcomes
            if (o.turns, o.curve, o.kind) == (turns, curve, kind)
        ]
        known = [value for value in values if value is not None]
        return sum(known), len(known)

    def figures(self) -> dict[tuple[str, str], dict[int, str]]:
        """Collect shares with 95 % intervals by measure and reader, then by turns."""
        shares: dict[tuple[str, str], dict[int, str]] = {}
        for kind, counted, name in MEASURES:
            for curve in self.curves():
                cells = {n: _share(*self.count(n, curve, kind, counted)) for n in self.turns()}
                shares[name, curve] = cells
        return shares

    def table(self) -> str:
        """Write two Markdown tables: by number of turns, and by sessions since it was told."""
        turns = self.turns()
        head = ["", "read with", *[f"{n} turns" for n in turns]]
        lines = [[m, c, *[by[n] for n in turns]] for (m, c), by in self.figures().items()]
        told = [o for o in self.outcomes if o.kind in (ONCE, UPDATED)]
        spans = sorted({_span(o.sessions) for o in told if o.sessions})
        far = [["told or updated so many sessions ago: named", *[_between(s) for s in spans]]]
        for curve in self.curves():
            cells = []
            for span in spans:
                hits = [o.right for o in told if o.curve == curve and _span(o.sessions) == span]
                cells.append(_share(sum(hits), len(hits)))
            far.append([curve, *cells])
        return f"{_markdown([head, *lines])}\n\n{_markdown(far)}"


def _span(sessions: int | None) -> int:
    """Find the span of a number of sessions: 1, 2, 3 to 4, 5 to 8 and so on."""
    return 0 if sessions is None else max(0, sessions - 1).bit_length()


def _between(span: int) -> str:
    first, last = 2 ** (span - 1) + 1 if span else 1, 2**span
    return str(last) if span < 2 else f"{first} to {last}"


def _share(right: int, count: int) -> str:
    if not count:
        return "-"
    low, high = wilson(right / count, count)
    return f"{right}/{count} ({low:.2f}-{high:.2f})"


def _markdown(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def scored(asked: Inquiry, answer: str) -> tuple[bool, bool, bool]:
    """Score an answer: right, the old value named instead, another thing's value named."""
    said = set(words(answer))

    def names(*values: str | None) -> bool:
        return any(value is not None and value.lower() in said for value in values)

    named, other = names(asked.value), names(*asked.others)
    silent = not other and not names(*asked.invented)
    right = {TAKEN_BACK: not named, NEVER: silent}.get(asked.kind, named)
    return right, names(asked.old) and not named, other


def hear(listener: Listener, talk: Dialogue) -> None:
    """Tell a listener all sessions."""
    for session in talk.sessions:
        for said in session:
            listener.tell(said.text, said.reply)
        listener.end_session()


def examine(listener: Listener, talk: Dialogue, **about: Any) -> list[Outcome]:
    """Ask a listener everything; `about` names the conversation and the reader."""
    outcomes = []
    for asked in talk.questions:
        answer = listener.ask(asked.text)
        right, old, other = scored(asked, answer)
        likeliest = None
        if asked.value is not None:
            likeliest = listener.would_say(asked.text, f" {asked.value}", asked.begun)
        outcome = Outcome(
            kind=asked.kind, right=right, old=old, other=other, likeliest=likeliest,
            distance=asked.turns, sessions=asked.sessions, answer=answer.strip()[:120], **about,
        )  # fmt: skip
        outcomes.append(outcome)
    return outcomes


@torch.no_grad()
def evaluate_conversations(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    turns: Iterable[int],
    *,
    dialogues: int = 3,
    topics: int = 2,
    session: int = 8,
    readers: tuple[str, ...] = READERS,
    seed: int = 0,
    name: str = "",
    progress: bool = True,
) -> ConversationsResult:
    """Tell conversations session by session, and ask at the end what is known.

    The memory hears every session once, in the turns of the model's chat template; its state is
    saved and loaded between sessions. Answers of the conversation are given, the same for all.
    Each question is asked of what was known when all sessions were over.

    Args:
        model: a memwrap model.
        tokenizer: the model's.
        turns: numbers of turns of the user.
        dialogues: conversations of each number.
        topics: topics of every kind of question.
        session: turns of a session.
        readers: those to ask: the memory, the model with an empty memory (in which the open
            segment still stands), and the backbone with the last tokens, with window and sinks
            (both as many tokens as take the memory's bytes), and with all of it where it fits.
        seed: of the conversations.
        name: of the model, for reports.
        progress: show a bar.

    Raises:
        ValueError: for an unknown reader, or numbers that do not go together.
    """
    numbers = list(turns)
    unknown = sorted(set(readers) - set(READERS))
    if unknown:
        raise ValueError(f"Unknown readers {unknown}; allowed: {', '.join(READERS)}.")
    if dialogues < 1:
        raise ValueError(f"`dialogues` is {dialogues}; at least 1.")
    talks = [
        (
            n,
            index,
            dialogue(seed * 1_000_003 + n * 1_009 + index, n, topics=topics, session=session),
        )
        for n in numbers
        for index in range(dialogues)
    ]
    result = ConversationsResult(name, seed, dialogues, topics, session)
    costs, was_training = Costs(), model.training
    model.eval()
    try:
        for n, index, talk in tqdm(talks, desc="conversations", disable=not progress):
            _one(model, tokenizer, talk, readers, result, costs, {"turns": n, "number": index})
    finally:
        model.train(was_training)
    result.seconds = {reader: round(value, 2) for reader, value in costs.seconds.items()}
    count = Counter(n for n, *_ in talks)
    for sums in (result.state_bytes, result.tokens):
        sums |= {key: value / count[int(key)] for key, value in sums.items()}
    return result


def _one(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    talk: Dialogue,
    readers: tuple[str, ...],
    result: ConversationsResult,
    costs: Costs,
    about: dict[str, Any],
) -> None:
    """Tell one conversation to all readers and ask them."""
    with tempfile.TemporaryDirectory() as folder:
        listener: Listener = Remembering(model, tokenizer, Path(folder))
        with costs.of(MEMORY, model.device):
            hear(listener, talk)
            state: Any = listener.talk.state  # type: ignore[attr-defined]
            if MEMORY in readers:
                result.outcomes += examine(listener, talk, curve=MEMORY, **about)
    equal = state.nbytes // bytes_per_token(model)
    equal = min(max(equal, 4 * SINKS), own_context(model))
    for sums, value in ((result.state_bytes, state.nbytes), (result.tokens, equal)):
        sums[str(about["turns"])] = sums.get(str(about["turns"]), 0) + value
    for curve in readers:
        if curve == MEMORY:
            continue
        rereading = Rereading(
            model, tokenizer, curve, int(state.fill[0]) if curve == OFF else equal
        )
        with costs.of(curve, model.device):
            hear(rereading, talk)
            longest = 2 * NEW_TOKENS + max(len(tokenizer.tokenize(q.text)) for q in talk.questions)
            if curve == FULL and not rereading.fits(longest):
                continue
            result.outcomes += examine(rereading, talk, curve=curve, **about)


__all__ = [
    "READERS", "ConversationsResult", "Outcome", "evaluate_conversations", "examine", "hear",
    "scored",
]  # fmt: skip
