"""A conversation over a memory: read once, ask many times, and remember what was said."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.state.memory_state import MemoryState


class Conversation:
    """Questions and answers that continue a state.

    Args:
        model: a memwrap model.
        tokenizer: the model's. With a chat template questions are put as a user's turn; without
            one they are plain text that the model continues.
        state: what has been read so far, one row; None for nothing.
        settings: for `generate`, such as `max_new_tokens`, `do_sample`, `temperature`.

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
        self.first = state
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, keep what was read before it."""
        self.state = self.first
        self._pending = torch.zeros(1, 0, dtype=torch.long)

    def ask(self, text: str, streamer: Any = None) -> str:
        """Put a question; the answer is remembered with it.

        Args:
            text: not empty.
            streamer: of transformers, gets the answer as it grows.

        Raises:
            ValueError: for an empty text.
        """
        ids = torch.cat([self._pending, self._encode(text)], 1).to(self.model.device)
        before = self.state.columns if self.state is not None else 0
        out = self.model.generate(
            ids,
            cache=self.state,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            return_dict_in_generate=True,
            pad_token_id=self._pad(),
            **self.settings,
        )
        self.state = out.cache
        # The last token was drawn but not read: it opens the next question.
        read = self.state.columns - before
        self._pending = out.sequences[:, read:].cpu()
        answer = out.sequences[0, ids.shape[1] :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _encode(self, text: str) -> torch.Tensor:
        if not text.strip():
            raise ValueError("The question is empty; give some text.")
        tokenizer: Any = self.tokenizer
        started = self.state is not None and self.state.columns > 0
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(text, add_special_tokens=not started)["input_ids"]
        return torch.tensor([ids])

    def _pad(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id


__all__ = ["Conversation"]
