"""What the demo compares: the base with what fits, and memories: documents in, answers out."""

from __future__ import annotations

from typing import Any, Protocol

import torch

import memwrap
from memwrap.backbones.cache_names import CACHE
from memwrap.chat import Conversation
from memwrap.chat.first_turn import cut_document
from memwrap.chat.held import Held
from memwrap.chat.turns import Turns, under
from memwrap.cli.demo_texts import Fact, question

ANSWER_TOKENS = 16


class Reader(Protocol):
    """Something that has read a document."""

    def ask(self, question: str) -> str:
        """Answer one question from the document alone."""

    def knows(self, fact: Fact) -> bool:
        """Tell whether each token of the fact's answer is the most likely one, in a turn that
        answers the question and has begun as the fact does."""


def _answer(turns: Turns, messages: list[dict[str, str]], fact: Fact) -> tuple[list[int], int]:
    """Compute the ids of a chat up to the end of the answer, and how many of them are that."""
    before, _, _ = fact.sentence.partition(fact.answer)
    begun = turns.text(messages) + before.rstrip()
    ids = turns.encode(f"{begun} {fact.answer}")
    return ids, len(ids) - len(turns.encode(begun))


def _first_choices(logits: torch.Tensor, ids: list[int], count: int) -> bool:
    """Tell whether the last ids are what logits `(T, V)` of the tokens so far have chosen."""
    return logits[-count - 1 : -1].argmax(-1).tolist() == ids[-count:]


class BaseReader:
    """The model as it is, over the first or the last tokens of a document.

    Args:
        base: the model.
        tokenizer: its tokenizer.
        document: text.
        tokens: so many of the last tokens at most, or where it is negative so many of the first;
            the turn around them not counted.
    """

    def __init__(self, base: Any, tokenizer: Any, document: str, tokens: int) -> None:
        self.base, self.tokenizer, self.turns = base, tokenizer, Turns(tokenizer)
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        kept = ids[-tokens:] if tokens > 0 else ids[:-tokens]
        self.text = document if len(kept) == len(ids) else tokenizer.decode(kept).strip()
        self.cache: Any = None
        self.ids: list[int] = []
        self._read()

    @property
    def length(self) -> int:
        """Tokens that were read."""
        return len(self.ids)

    @torch.no_grad()
    def shorten(self, document: str) -> None:
        """Go back to a shorter document that begins as the one that was read: nothing is read
        twice."""
        self.text = document
        self._read()

    @torch.no_grad()
    def _read(self) -> None:
        before, (self.ids, _) = self.ids, cut_document(self.turns, self.text, 0)
        same = next(
            (n for n, pair in enumerate(zip(before, self.ids, strict=False)) if len(set(pair)) > 1),
            min(len(before), len(self.ids)),
        )
        if before[same:]:
            self.cache.crop(same - len(before))
        if new := self.ids[same:]:
            out = self.base(
                torch.tensor([new]), use_cache=True, logits_to_keep=1, **{CACHE: self.cache}
            )
            self.cache = out[CACHE]

    @torch.no_grad()
    def knows(self, fact: Fact) -> bool:
        content = under(self.text, question(fact))
        ids, count = _answer(self.turns, [{"role": "user", "content": content}], fact)
        new = torch.tensor([ids[self.length :]])
        logits = self.base(new, **{CACHE: self.cache}, logits_to_keep=count + 1).logits[0]
        self._back()
        return _first_choices(logits, ids, count)

    def ask(self, question: str) -> str:
        content = under(self.text, question)
        ids = torch.tensor([self.turns.ids([{"role": "user", "content": content}])])
        out = self.base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS,
            do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
            **{CACHE: self.cache},
        )  # fmt: skip
        self._back()
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def _back(self) -> None:
        """Take the question and its answer back."""
        self.cache.crop(self.length - self.cache.get_seq_length())


class MemoryReader:
    """A memory model and the state that a document left (`memwrap.chat.read_document`).

    Args:
        model: a memwrap model.
        tokenizer: its tokenizer.
        state: the state.
    """

    def __init__(self, model: Any, tokenizer: Any, state: memwrap.MemoryState) -> None:
        self.model, self.tokenizer, self.state = model, tokenizer, state

    @torch.no_grad()
    def knows(self, fact: Fact) -> bool:
        turns = Turns(self.tokenizer)
        held = Held.of(self.state, turns)
        if held is None:
            raise ValueError("The state was not read as a document in a chat turn.")
        asked = held.messages([{"role": "user", "content": question(fact)}])
        ids, count = _answer(turns, asked, fact)
        options: dict[str, Any] = {CACHE: self.state.clone()}
        logits = self.model(
            torch.tensor([ids[held.read :]]), **options, logits_to_keep=count + 1
        ).logits
        return _first_choices(logits[0], ids, count)

    def ask(self, question: str) -> str:
        settings = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        return Conversation(self.model, self.tokenizer, self.state, **settings).ask(question)


def nats(model: Any, ids: list[int], piece: int) -> tuple[list[float], list[int]]:
    """Compute nats of every token after the first, read in pieces, and the state's bytes after
    each piece."""
    state, values, sizes = model.new_state(1), [], []
    row = torch.tensor([ids])
    targets = row[0, 1:]
    with torch.no_grad():
        for first in range(0, len(ids) - 1, piece):
            part = row[:, first : min(first + piece, len(ids) - 1)]
            logits = model(part, cache=state).logits[0].float()
            wanted = targets[first : first + part.shape[1]]
            values += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
            sizes.append(state.nbytes)
    return values, sizes


__all__ = ["ANSWER_TOKENS", "BaseReader", "MemoryReader", "Reader", "nats"]
