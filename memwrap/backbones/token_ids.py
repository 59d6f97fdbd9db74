"""Decoders that look at the ids of what they read beside their embeddings (a table for every layer,
experts chosen by id): they are given ids, and their own embeddings give way to those of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from torch import Tensor, nn

from memwrap.backbones.class_swaps import lend, subclass

KIND = "token_ids"
_embeds: ContextVar[Tensor | None] = ContextVar("memwrap_embeds", default=None)


@cache
def _giving(parent: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        embeds = _embeds.get()
        if embeds is not None and embeds.shape[:2] == input.shape:
            return embeds
        return parent.forward(self, input, *args, **kwargs)

    return subclass(parent, KIND, forward=forward)


def attach(embeddings: nn.Module) -> None:
    """Let a model's token embeddings give way to those of a run."""
    lend(embeddings, KIND, _giving)


@contextmanager
def embeddings_given(embeds: Tensor | None) -> Iterator[None]:
    """Let attached token embeddings give `embeds` `(B, T, D)` for ids `(B, T)` in the block; None:
    their own."""
    token = _embeds.set(embeds)
    try:
        yield
    finally:
        _embeds.reset(token)


def filled(ids: Tensor | None, embeds: Tensor, config: Any) -> Tensor:
    """Give every column of `embeds` `(B, T, D)` an id.

    What is no token of the text (memory tokens, padding, embeddings given without ids) gets that of
    padding, as pictures do in models that see; 0 where there is none.
    """
    pad = getattr(config, "pad_token_id", None)
    none = pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0
    if ids is None:
        return embeds.new_full(embeds.shape[:2], none, dtype=int)  # type: ignore[arg-type]
    return ids.to(embeds.device).masked_fill(ids.to(embeds.device) < 0, none)
