"""Context and questions in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memwrap.chat.conversation import Conversation
from memwrap.chat.first_turn import read_document
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.model.opening import open_model, open_tokenizer
from memwrap.state.memory_state import MemoryState


class DocumentPipeline:
    """A model that reads a text once and answers questions about it. Made by `memwrap.pipeline`.

    Attributes:
        model: the memwrap model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: MemoryModelForCausalLM, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def read(self, context: str, *, progress: bool = False) -> MemoryState:
        """Read a text into a state, to be given as context any number of times."""
        return read_document(self.model, self.tokenizer, context, progress=progress)

    def __call__(
        self,
        context: str | MemoryState,
        question: str | None = None,
        *,
        questions: Sequence[str] | None = None,
        max_new_tokens: int = 50,
        **settings: Any,
    ) -> dict[str, Any]:
        """Answer one question or several, each from the context alone.

        Args:
            context: a text, or the state of one that was read.
            question: one question; the result is `{"answer": text}`.
            questions: several; the result is `{"answers": [text, ...]}`.
            max_new_tokens: longest answer.
            settings: of `generate`; answers are greedy by default.

        Raises:
            ValueError: if not exactly one of `question` and `questions` is given.
        """
        if (question is None) == (questions is None):
            raise ValueError("Give `question`, or a list as `questions`, and not both.")
        if isinstance(questions, str):
            raise ValueError("`questions` is text; give a list, or `question`.")
        state = context if isinstance(context, MemoryState) else self.read(context)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **settings}
        asked = [question] if question is not None else list(questions or [])
        answers = [
            Conversation(self.model, self.tokenizer, state, **settings).ask(text).strip()
            for text in asked
        ]
        return {"answers": answers} if question is None else {"answer": answers[0]}


def pipeline(
    model: str | Path | MemoryModelForCausalLM,
    memory: str | None = None,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    **settings: Any,
) -> DocumentPipeline:
    """Make a pipeline that answers questions about a text of any length.

    Examples:
        >>> import memwrap
        >>> pipe = memwrap.pipeline("tiny-lm", "infllm")
        >>> found = pipe("def f(x): return x", questions=["import"], max_new_tokens=4)
        >>> len(found["answers"])
        1

    Args:
        model: a memwrap model, or what opens one: a folder, a name such as `"smollm2"`, or a repo
            id on the Hub.
        memory: for a model without one, the name of a memory; `"infllm"` needs no training.
        tokenizer: the model's; found by its name.
        dtype: of the backbone; as saved by default.
        settings: fields of the memory's config.

    Raises:
        ValueError: for a model object without a tokenizer or with a memory beside it, and as
            `load` and `wrap`.
    """
    if isinstance(model, MemoryModelForCausalLM):
        if tokenizer is None or memory or settings or dtype:
            raise ValueError("A model was given: give its `tokenizer` with it, and nothing else.")
        return DocumentPipeline(model, tokenizer)
    opened = open_model(model, memory, settings, dtype=dtype)
    return DocumentPipeline(opened, tokenizer or open_tokenizer(model, opened))


__all__ = ["DocumentPipeline", "pipeline"]
