"""Reading a document into the place where a chat template puts it: the first user's turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from memwrap.chat.held import Held
from memwrap.chat.turns import Turns, under
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState

_CONTEXT = 400  # characters
_TRIES = 12
# Beginnings of questions that may be joined with the end of a document in one token.
_QUESTIONS = ("What is it?", "\n- 1", " a")


def read_document(
    model: MemoryModelForCausalLM,
    tokenizer: Any,
    text: str,
    state: MemoryState | None = None,
    *,
    progress: bool | str = False,
) -> MemoryState:
    """Read a document once, to be asked about many times.

    With a chat template it is read as the beginning of the first user's turn. The turn stays open:
    a `Conversation` over the state puts a question under the document, and what was read in all
    is exactly what the template makes of both. Without one it is read as plain text.

    Args:
        model: a memwrap model.
        tokenizer: the model's.
        text: not empty.
        state: continue this one; a document in an open turn is followed by this one.
        progress: show a bar; a text is its name.

    Returns:
        The state; `state` stays as it is.

    Raises:
        ValueError: for an empty text, a template that changes what is said, or a state in which a
            question was asked already.
    """
    if not text.strip():
        raise ValueError("The document is empty; give some text.")
    turns = Turns(tokenizer)
    if not turns.present:
        special = state is None or not state.columns
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return model.read([ids], state=state, progress=progress)
    held = Held.of(state, turns)
    if held is not None and held.turns:
        raise ValueError("A question was asked of this state; read documents before questions.")
    content = under(held.document if held is not None else "", text.strip())
    ids, new = cut_document(turns, content, held.read if held is not None else 0)
    new.behind = held.behind if held is not None else bool(state is not None and state.columns)
    if new.behind:
        rest = turns.without_beginning(ids)
        new.read, ids = new.read - (len(ids) - len(rest)), rest
    ids = ids[held.read :] if held is not None else ids
    state = model.read(torch.tensor([ids]), state=state, progress=progress)
    new.put(state)
    return state


def cut_document(turns: Turns, content: str, least: int) -> tuple[list[int], Held]:
    """Find the ids of a document's beginning that stay as they are whatever is asked about it.

    Args:
        turns: the template.
        content: the document.
        least: so many ids at least.

    Returns:
        The ids, those in front of the document among them, and what is kept of the text.
    """
    lead = turns.lead()
    wholes = [_whole(turns, lead, under(content, q)) for q in _QUESTIONS]
    for place in _places(content):
        begin = max(0, place - _CONTEXT)
        context, tail = content[begin:place], content[place:]
        ids, short = turns.encode(lead + content[:place]), turns.encode(lead + context)
        shorts = [_whole(turns, lead, under(context + tail, q)) for q in _QUESTIONS]
        if len(ids) < least or any(whole[: len(ids)] != ids for whole in wholes):
            continue
        pairs = zip(wholes, shorts, strict=True)
        if all(w[len(ids) :] == s[len(short) :] and s[: len(short)] == short for w, s in pairs):
            return ids, Held(context, tail, [], len(short), len(turns.encode(lead)))
    raise ValueError(
        "The end of the document cannot be cut where the tokenizer joins nothing; end it with "
        "a full sentence."
    )


def _whole(turns: Turns, lead: str, content: str) -> list[int]:
    return turns.encode(lead + content)


def _places(content: str) -> Iterator[int]:
    """Propose where to cut: in front of the last words, then in front of the last characters."""
    tries, place = 0, len(content.rstrip())
    while tries < _TRIES and place > 0:
        place = max(content.rfind(" ", 0, place), content.rfind("\n", 0, place))
        if place > 0 and not content[place - 1].isspace():
            tries += 1
            yield place
    yield from range(len(content) - 1, max(0, len(content) - _TRIES), -1)
    yield 0


__all__ = ["cut_document", "read_document"]
