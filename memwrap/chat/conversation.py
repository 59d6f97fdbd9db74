"""A conversation over a memory: read once, ask many times, and remember what was said."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from memwrap.backbones.cache_names import CACHE
from memwrap.chat.first_turn import read_document
from memwrap.chat.held import Held
from memwrap.chat.turns import Message, Turns, common_length
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState

_UNDONE = 8


class Conversation:
    """Questions and answers that continue a state.

    With a chat template what the model has read is, at every moment, what the template makes of
    the whole conversation: a document in the first turn, one beginning of text, answers that end
    as answers do. Only what is new is run. Where the template or the tokenizer makes something
    else of an answer than the model wrote, that answer is read again as it is rendered.

    Examples:
        >>> import memwrap
        >>> from memwrap.assets import asset
        >>> from memwrap.chat import Conversation
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
        >>> talk = Conversation(memwrap.load("armt-lm"), tokenizer, max_new_tokens=4)
        >>> isinstance(talk.ask("import"), str)
        True

    Args:
        model: a memwrap model.
        tokenizer: the model's. With a chat template questions are put as a user's turn; without
            one they are plain text that the model continues.
        state: what has been read so far, one row; None for nothing.
        settings: for `generate`, such as `max_new_tokens`, `do_sample`, `temperature`.

    Attributes:
        state: what has been read, the conversation included.
        turns: messages so far, with a chat template.

    Raises:
        ValueError: if the state belongs to another model or has several rows.
    """

    def __init__(
        self,
        model: MemoryModelForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        state: MemoryState | None = None,
        **settings: Any,
    ) -> None:
        if state is not None:
            model.check_state(state)
            if state.batch_size != 1:
                raise ValueError(
                    f"The state has {state.batch_size} rows; a conversation continues one "
                    "(state.select(torch.tensor([0])))."
                )
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._template = Turns(tokenizer)
        self.first = state
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep what was read before it."""
        self.state = self.first
        # Text that was read in some other way stands in front of the chat.
        started = self.first is not None and self.first.columns > 0
        self._held = Held.of(self.first, self._template) or Held(behind=started)
        self.turns: list[Message] = list(self._held.turns)
        # Ids that were read or drawn, and how many of them were read.
        self._ids: list[int] = []
        self._read = self._held.read
        # States share what they have in common, so that going back costs what was written since.
        self._earlier: deque[tuple[Any, ...]] = deque(maxlen=_UNDONE)

    def undo(self) -> None:
        """Take back the last question and its answer, as if they had not been; up to eight times.

        Raises:
            ValueError: if there is none to take back.
        """
        if not self._earlier:
            raise ValueError("There is no question to take back.")
        self.state, self.turns, self._ids, self._read = self._earlier.pop()

    def read(self, text: str, *, progress: bool = False) -> None:
        """Read a document (`read_document`): `reset` keeps it.

        Raises:
            ValueError: after a question, and as `read_document`.
        """
        if self._ids:
            raise ValueError("A question was asked already; read documents first, or reset.")
        self.first = read_document(self.model, self.tokenizer, text, self.first, progress=progress)
        self.reset()

    def ask(self, text: str, streamer: Any = None) -> str:
        """Put a question; the answer is remembered with it.

        Args:
            text: not empty.
            streamer: of transformers, gets the answer as it grows.

        Raises:
            ValueError: for an empty text, or a template that leaves out earlier turns.
        """
        whole, read = self._asked(text), self._read
        new = torch.tensor([whole[read:]], device=self.model.device)
        out: Any = self.model.generate(
            new,
            cache=self.state,
            attention_mask=torch.ones_like(new),
            streamer=streamer,
            return_dict_in_generate=True,
            pad_token_id=self._pad(),
            **{**self._template.stops_for(self.model), **self.settings},
        )
        after = out[CACHE]
        drawn = out.sequences[0, new.shape[1] :].tolist()
        answer = self.tokenizer.decode(
            drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        # The last token was drawn but not read: it is for the next question.
        count = read + after.columns - (self.state.columns if self.state is not None else 0)
        self._earlier.append((self.state, self.turns, self._ids, self._read))
        if self._template.present:
            self.turns = [*self.turns, *_exchange(text, str(answer))]
            try:
                self._settle(whole[:read], after, (whole + drawn)[:count])
            except BaseException:  # Ctrl-C, while the answer is read as it is rendered
                self.undo()
                raise
        else:
            self._ids, self._read, self.state = whole + drawn, count, after
        return str(answer)

    def tell(self, text: str, answer: str) -> None:
        """Go on with a turn whose answer is given: both are read, nothing is generated.

        Args:
            text, answer: not empty.

        Raises:
            ValueError: for an empty text or answer, or a template that leaves out earlier turns.
        """
        if not text.strip() or not answer.strip():
            raise ValueError("The turn or its answer is empty; give some text for both.")
        earlier = (self.state, self.turns, self._ids, self._read)
        if self._template.present:
            turns = [*self.turns, *_exchange(text, answer)]
            self._template.check_shown([*turns, _question("?")])
            self.turns = turns
            ids = self._checked(self._settled())
        else:
            ids = self._continued(f"{text}\n{answer}\n")
        new, state = ids[self._read :], self.state
        after = self.model.read(torch.tensor([new]), state=state) if new else state
        self._earlier.append(earlier)
        self._ids, self._read, self.state = ids, len(ids), after
        self._note()

    @torch.no_grad()
    def would_say(self, text: str, answer: str, begun: str = "") -> bool:
        """Tell whether each token of an answer is the likeliest one, as greedy decoding takes it.

        Nothing is remembered of it.

        Args:
            text: the question.
            answer: what is asked for, as it follows `begun`.
            begun: the beginning of the answer, which is given.

        Raises:
            ValueError: for an empty question or answer.
        """
        prompt = self._asked(text)
        ids, wanted = self._template.following(prompt, begun, answer)
        if not wanted:
            raise ValueError("The answer is empty; give some text.")
        new = torch.tensor([(ids + wanted)[self._read :]], device=self.model.device)
        state = None if self.state is None else self.state.clone()
        logits = self.model(
            input_ids=new[:, :-1], cache=state, use_cache=True, logits_to_keep=len(wanted)
        ).logits
        return logits[0].argmax(-1).tolist() == wanted

    def _asked(self, text: str) -> list[int]:
        """Compute the ids of all that was said with a question behind it."""
        if not text.strip():
            raise ValueError("The question is empty; give some text.")
        if not self._template.present:
            return self._continued(text)
        turns = [*self.turns, _question(text)]
        self._template.check_shown(turns)
        return self._checked(self._rendered(turns))

    def _checked(self, ids: list[int]) -> list[int]:
        known = self._ids[: self._read]
        if known and ids[: self._read] != known:
            raise ValueError(
                "The chat template makes another beginning of this conversation than was read."
            )
        return ids

    def _rendered(self, turns: list[Message]) -> list[int]:
        """Compute the ids of the whole conversation: with a document, of its last words on."""
        ids = self._template.ids(self._held.messages(turns))
        return self._template.without_beginning(ids) if self._held.behind else ids

    def _continued(self, text: str) -> list[int]:
        """Compute the ids of plain text behind all that was said."""
        started = bool(self._ids) or self._held.behind
        tokenizer: Any = self.tokenizer
        return self._ids + tokenizer(text, add_special_tokens=not started)["input_ids"]

    def _settle(self, before: list[int], after: MemoryState, ids: list[int]) -> None:
        """Take over the state after an answer.

        Args:
            before: ids that had been read when the question came.
            after: the state now.
            ids: what it has read.
        """
        # A template that leaves out this turn cannot go on: the next question says so.
        settled = self._settled() if self._template.shows([*self.turns, _question("?")]) else ids
        if settled[: len(ids)] != ids:
            state = self.state
            if settled[: len(before)] != before:  # earlier turns are rendered in another way now
                before, state = settled[: self._held.read], self.first
            rest = settled[len(before) :]
            if rest or state is None:
                after = self.model.read(torch.tensor([rest]), state=state)
            else:
                after = state.clone()
            ids = settled
        self._ids, self._read, self.state = ids, len(ids), after
        self._note()

    def _settled(self) -> list[int]:
        """Compute the ids of all turns, as far as they stay as they are whatever comes next."""
        first, second = (self._rendered([*self.turns, _question(text)]) for text in ("?", "And"))
        return first[: common_length(first, second)]

    def _note(self) -> None:
        """Note in the state what was said, for a conversation that continues it."""
        if self._template.present and self.state is not None:
            lead = self._template.lead_length()
            replace(self._held, turns=self.turns, read=self._read, lead=lead).put(self.state)

    def _pad(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id


def _question(text: str) -> Message:
    return {"role": "user", "content": text}


def _exchange(text: str, answer: str) -> list[Message]:
    return [_question(text), {"role": "assistant", "content": answer}]


__all__ = ["Conversation"]
