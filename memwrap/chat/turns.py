"""The chat template of a tokenizer: which ids a conversation is made of."""

from __future__ import annotations

from typing import Any

Message = dict[str, str]
# Stands for text in a rendered template, to find what is around it.
_MARK = "\u2402text\u2402"
SEPARATOR = "\n\n"
"""Between a document and the question about it, in one turn."""


class Turns:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with or without a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.present = bool(getattr(tokenizer, "chat_template", None))

    def text(self, messages: list[Message], *, answer: bool = True) -> str:
        """Render messages, with the opening of an answer behind them if `answer`."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )

    def ids(self, messages: list[Message], *, answer: bool = True) -> list[int]:
        """Compute the ids of the rendered messages."""
        return self.encode(self.text(messages, answer=answer))

    def encode(self, text: str) -> list[int]:
        """Compute the ids of a rendered text, which names its special tokens itself."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def shows(self, messages: list[Message]) -> bool:
        """Tell whether the template shows all of a chat: some leave out all but the last turn."""
        marks = [f"\u2402{number}\u2402" for number in range(len(messages))]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        text = self.text(marked)
        return all(mark in text for mark in marks)

    def check_shown(self, messages: list[Message]) -> None:
        """Refuse a chat of which the template leaves something out.

        Raises:
            ValueError: says what to do.
        """
        if not self.shows(messages):
            raise ValueError(
                "The tokenizer's chat template leaves out earlier turns: begin anew with each "
                "question (reset), or give one that shows them (tokenizer.chat_template = ...), "
                "or None for plain text."
            )

    def following(self, ids: list[int], begun: str, answer: str) -> tuple[list[int], list[int]]:
        """Compute ids with the beginning of an answer behind them, and the ids of its rest."""
        start = self.encode(begun) if begun else []
        both = self.encode(begun + answer)
        if both[: len(start)] != start:  # joined in one token
            both = start + self.encode(answer)
        return ids + start, both[len(start) :]

    def lead(self) -> str:
        """Find the text that a template puts in front of what a user says first.

        Raises:
            ValueError: for a template that does not repeat it word for word.
        """
        parts = self._around([{"role": "user", "content": _MARK}])
        if parts is None:
            raise ValueError(
                "The tokenizer's chat template does not repeat a message word for word; give one "
                "that does (tokenizer.chat_template = ...), or None for plain text."
            )
        return parts[0]

    def lead_length(self) -> int:
        """Count the ids in front of what a user says first; 0 where that cannot be told."""
        parts = self._around([{"role": "user", "content": _MARK}])
        return 0 if parts is None else len(self.encode(parts[0]))

    def stops(self) -> list[int]:
        """Find the special token that ends an answer in this template, if there is one."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        parts = self._around(turns)
        first = self.encode(parts[1])[:1] if parts is not None else []
        tokenizer = self.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        return [token for token in first if token in special]

    def stops_for(self, model: Any) -> dict[str, Any]:
        """Name the token that ends a turn to `generate`, if the model does not know it."""
        known = model.generation_config.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        new = self.stops() if self.present else []
        return {"eos_token_id": [*known, *new]} if set(new) - set(known) else {}

    def without_beginning(self, ids: list[int]) -> list[int]:
        """Drop the token for the beginning of a text, for ids that come behind another text.

        Some tokenizers name as that token one that opens every turn; it stays.
        """
        bos = self.tokenizer.bos_token_id
        if not ids or bos is None or ids[0] != bos:
            return ids
        turns = [
            {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"},
            {"role": "user", "content": "?"},
        ]  # fmt: skip
        return ids if self.ids(turns).count(bos) > 1 else ids[1:]

    def _around(self, messages: list[Message]) -> list[str] | None:
        """Return the texts in front of and behind the mark, or None if it does not stand there
        once."""
        parts = self.text(messages, answer=False).split(_MARK)
        return parts if len(parts) == 2 else None


def under(content: str, text: str) -> str:
    """Put a question under a document."""
    return f"{content}{SEPARATOR}{text}" if content else text


def common_length(a: list[int], b: list[int]) -> int:
    """Count the ids that two lists begin with alike."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


__all__ = ["SEPARATOR", "Message", "Turns", "common_length", "under"]
