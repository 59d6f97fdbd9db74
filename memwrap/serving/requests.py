"""What clients may send: OpenAI's requests, and those about states."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memwrap.serving.answers import Sampling
from memwrap.serving.engine import Limits

# Settings of OpenAI's that mean nothing here unless they are left as they are.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1, None), "best_of": (1, None), "echo": (False, None), "suffix": (None,),
    "logprobs": (False, None), "top_logprobs": (0, None), "logit_bias": ({}, None),
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "tools": ([], None),
    "tool_choice": ("none", None), "functions": ([], None), "function_call": ("none", None),
    "response_format": ({"type": "text"}, None),
}  # fmt: skip


class Message(BaseModel):
    """One message of a chat; its content is text or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    def plain(self) -> dict[str, str]:
        """Return the message with its content as one text.

        Raises:
            ValueError: for parts that are no text.
        """
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        if any(part.get("type") != "text" for part in self.content):
            raise ValueError("Only text is read here; send no images, sounds or files.")
        return {"role": role, "content": "".join(str(p.get("text", "")) for p in self.content)}


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    state: str | None = None

    @model_validator(mode="after")
    def _known(self) -> _Request:
        for name, allowed in _ONLY.items():
            value = (self.model_extra or {}).get(name)
            if value not in allowed:
                raise ValueError(f"`{name}` = {value!r} is not supported here; leave it out")
        return self

    @property
    def counts(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, ends: tuple[int, ...], limits: Limits) -> Sampling:
        """Collect how the answer is drawn."""
        most = self.max_completion_tokens or self.max_tokens or limits.new_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            min(most, limits.new_tokens), self.temperature, self.top_p, self.top_k, self.seed,
            tuple(s for s in stop if s), ends,
        )  # fmt: skip


class ChatRequest(_Request):
    """POST /v1/chat/completions. `state` names what the chat continues."""

    messages: list[Message] = Field(min_length=1)


class CompletionRequest(_Request):
    """POST /v1/completions. `state` names what the prompt continues."""

    prompt: str | list[int] | list[str]
    max_tokens: int | None = Field(16, ge=1)


class NewState(BaseModel):
    """POST /v1/states: read a text into a state.

    Attributes:
        name: the new state's.
        text: what is read; with a chat template, at the beginning of the first user's turn.
        after: continue a copy of this state.
        save: write it to its file at once.
    """

    name: str
    text: str = Field(min_length=1)
    after: str | None = None
    save: bool = False


class Fork(BaseModel):
    """POST /v1/states/NAME/fork: a second name for the same."""

    to: str


__all__ = ["ChatRequest", "CompletionRequest", "Fork", "Message", "NewState"]
