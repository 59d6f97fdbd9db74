"""From a request to ids: chats by the model's template, behind a named state where one is meant."""

from __future__ import annotations

from typing import Any

from memwrap.chat.held import Held
from memwrap.chat.turns import Message, Turns
from memwrap.state.memory_state import MemoryState


def chat_ids(tokenizer: Any, messages: list[Message], state: MemoryState | None) -> list[int]:
    """Compute the ids of a chat that a model reads behind `state`.

    A document in the state stands in the first user's turn, as `read_document` put it there.

    Raises:
        ValueError: without a chat template; for a system message behind a state, or a template that
            leaves out what was read.
    """
    turns = Turns(tokenizer)
    if not turns.present:
        raise ValueError("The model has no chat template; use /v1/completions.")
    held = Held.of(state, turns)
    if held is None:
        ids = turns.ids(messages)
        return turns.without_beginning(ids) if state is not None and state.columns else ids
    if messages[0]["role"] == "system":
        raise ValueError("The state was read without a system message; leave it out.")
    whole = held.messages([*held.turns, *messages])
    turns.check_shown(whole)
    ids = turns.ids(whole)
    if held.behind:
        ids = turns.without_beginning(ids)
    return ids[held.read :]


def plain_ids(tokenizer: Any, prompt: Any, state: MemoryState | None) -> list[int]:
    """Compute the ids of a prompt without a template, behind `state`.

    Raises:
        ValueError: for several prompts in one request.
    """
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        elif any(isinstance(part, str) for part in prompt):
            raise ValueError("Several prompts in one request are not supported; send one each.")
        else:
            return list(prompt)
    started = state is not None and state.columns > 0
    return tokenizer(prompt, add_special_tokens=not started, verbose=False)["input_ids"]


def ends_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Collect the ids that end an answer."""
    known = model.generation_config.eos_token_id
    ends = list(known) if isinstance(known, list) else [] if known is None else [known]
    turns = Turns(tokenizer)
    if turns.present:
        ends += turns.stops()
    elif not ends and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    return tuple(dict.fromkeys(ends))


__all__ = ["chat_ids", "ends_of", "plain_ids"]
