"""Those who hear a conversation and are asked about it: a memory over saved states, and the
backbone, which reads again what it is allowed to see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from memwrap.backbones.adapters import lora_disabled
from memwrap.chat import Conversation
from memwrap.chat.turns import Message, Turns, common_length
from memwrap.evaluation.controls import FULL, OFF, TRUNCATED, WINDOW, own_context, windowed
from memwrap.evaluation.suite import PIECE, greedy
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState

Feed = Callable[[Tensor], Tensor]
NEW_TOKENS = 16


class Listener(Protocol):
    """Whoever hears turns with their answers, session by session, and answers questions."""

    def tell(self, text: str, answer: str) -> None:
        """Hear a turn."""

    def end_session(self) -> None:
        """Stop, to go on another day."""

    def ask(self, question: str) -> str:
        """Answer, and remember nothing of it."""

    def would_say(self, question: str, answer: str, begun: str) -> bool:
        """Tell whether `answer` is what greedy decoding puts behind `begun`."""


class Remembering:
    """A memory that hears each session once; its state is saved and loaded in between.

    Args:
        model, tokenizer: of the conversation.
        folder: for the state.

    Attributes:
        talk: the conversation; its state is what is remembered.
    """

    def __init__(
        self, model: MemoryModelForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        self.model, self.tokenizer, self.path = model, tokenizer, folder / "state.safetensors"
        self.plain = not Turns(tokenizer).present
        self.talk = self._talk(None)

    def _talk(self, state: MemoryState | None) -> Conversation:
        return Conversation(
            self.model, self.tokenizer, state, max_new_tokens=NEW_TOKENS, do_sample=False
        )

    def tell(self, text: str, answer: str) -> None:
        self.talk.tell(text, answer)

    def end_session(self) -> None:
        if self.talk.state is not None:
            self.talk.state.save(self.path)
            self.talk = self._talk(MemoryState.load(self.path, self.model))

    def ask(self, question: str) -> str:
        answer = self.talk.ask(_put(question, self.plain))
        self.talk.undo()
        return answer

    def would_say(self, question: str, answer: str, begun: str) -> bool:
        begun = f" {begun}" if self.plain else begun
        return self.talk.would_say(_put(question, self.plain), answer, begun)


class Rereading:
    """The backbone without a memory, which reads the conversation as far as it may, and again.

    Args:
        model, tokenizer: of the conversation.
        curve: how much is seen: "base, truncated" (the last `tokens` and the question), "base,
            window + sinks" (as many), "base, full context", or "memory off" (with an empty memory,
            what stood in the segment that is open).
        tokens: of the history, for the curves that take a part of it.
    """

    def __init__(
        self,
        model: MemoryModelForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        curve: str,
        tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.curve, self.tokens = model, tokenizer, curve, tokens
        self.template = Turns(tokenizer)
        self.turns: list[Message] = []
        self._read: Any = None  # a cache or a state of the history

    def tell(self, text: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._read = None

    def end_session(self) -> None:
        """Keep all turns: the text itself is what is kept."""

    def ask(self, question: str) -> str:
        history, rest = self._parts(question)
        with self._behind(history) as feed:
            (ids,) = greedy(feed, self._tensor(rest), NEW_TOKENS, self.ends())
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def would_say(self, question: str, answer: str, begun: str) -> bool:
        history, rest = self._parts(question)
        begun = begun if self.template.present else f" {begun}"
        ids, wanted = self.template.following(rest, begun, answer)
        with self._behind(history) as feed:
            logits = feed(self._tensor(ids + wanted[:-1]))
        return logits[0, -len(wanted) :].argmax(-1).tolist() == wanted

    def fits(self, longest: int) -> bool:
        """Tell whether the backbone sees the history and `longest` more tokens at once."""
        return len(self.history()) + longest <= own_context(self.model)

    def ends(self) -> list[int]:
        """List the ids that end an answer."""
        known: Any = self.template.stops_for(self.model).get("eos_token_id")
        known = known or getattr(self.model.generation_config, "eos_token_id", None)
        return known if isinstance(known, list) else [] if known is None else [known]

    def history(self) -> list[int]:
        """Compute the ids of what was said, as far as they stay whatever is asked."""
        if not self.template.present:
            text = "".join(f"{turn['content']}\n" for turn in self.turns)
            return self._plain(text, True) if text else []
        first, second = self._prompt("?"), self._prompt("And")
        return first[: common_length(first, second)]

    def _prompt(self, question: str) -> list[int]:
        return self.template.ids([*self.turns, {"role": "user", "content": question}])

    def _plain(self, text: str, first: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]

    def _parts(self, question: str) -> tuple[list[int], list[int]]:
        """Find the ids of what was said and is seen, and those of the question behind it."""
        history = self.history()
        if self.template.present:
            rest = self._prompt(question)[len(history) :]
        else:
            rest = self._plain(_put(question, True), not history)
        seen = self.tokens if self.curve in (OFF, TRUNCATED) else len(history)
        return history[len(history) - min(seen, len(history)) :], rest

    @contextmanager
    def _behind(self, history: list[int]) -> Iterator[Feed]:
        """Make a function from the next ids behind the history to their logits."""
        model = self.model
        if self.curve == WINDOW:
            with torch.no_grad(), windowed(model, self.tokens, 1) as (feed, _):
                if self._read is None:
                    self._through(feed, history)
                    self._read = feed.state
                feed.state = self._read
                yield feed
            return
        if self.curve == OFF:
            with torch.no_grad():
                if self._read is None:
                    self._read = model.read([history]) if history else model.new_state(1)
                state = self._read.clone()
                yield lambda ids: model(input_ids=ids, cache=state).logits
            return
        name = model.parts.cache_name
        with torch.no_grad(), lora_disabled(model.backbone):
            if self._read is None:
                self._read = DynamicCache(config=model.parts.config)
                self._through(lambda ids: self._logits(ids, {name: self._read}, 1), history)
            cache = copy.deepcopy(self._read)
            yield lambda ids: self._logits(ids, {name: cache}, 0)

    def _logits(self, ids: Tensor, cache: dict[str, Any], keep: int) -> Tensor:
        return self.model.backbone(input_ids=ids, logits_to_keep=keep, **cache).logits

    def _through(self, feed: Feed, history: list[int]) -> None:
        if history:
            for part in self._tensor(history).split(PIECE, 1):
                feed(part)

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)


def _put(question: str, plain: bool) -> str:
    """Put a question as text that goes on, for a model without a chat template."""
    return f"Question: {question}\nAnswer:" if plain else question


@torch.no_grad()
def bytes_per_token(model: MemoryModelForCausalLM) -> int:
    """Count the bytes of a token's keys and values in the backbone's own cache."""
    cache: Any = DynamicCache(config=model.parts.config)
    with lora_disabled(model.backbone):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model.backbone(input_ids=ids, **{model.parts.cache_name: cache})
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))


__all__ = ["FULL", "NEW_TOKENS", "Listener", "Remembering", "Rereading", "bytes_per_token"]
