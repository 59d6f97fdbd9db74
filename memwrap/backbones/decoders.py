"""The decoder inside a model, however deep it lies, and the head that stands over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions


def modules_within(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those in it, in order, as often as they are there, but none of the models
    in it (towers that see or hear): without the names that `modules` makes, which cost much of a
    short call."""
    yield module
    for inner in module._modules.values():
        if inner is not None and not isinstance(inner, PreTrainedModel):
            yield from modules_within(inner)


def find_decoder(model: PreTrainedModel) -> nn.Module:
    """Find the part that turns embeddings into last hidden states: the innermost model that holds
    the input embeddings. Models that see or hear hold it two levels deep.

    Raises:
        ValueError: if the model names none.
    """
    named = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder: nn.Module | None = None if named is model else named
    embeddings = model.get_input_embeddings()
    # Of some the name leads to the head.
    for module in (decoder if isinstance(decoder, PreTrainedModel) else model).modules():
        holds = isinstance(module, PreTrainedModel) and module is not model
        if holds and embeddings is not None and any(m is embeddings for m in module.modules()):
            decoder = module
    if decoder is None:
        raise ValueError(f"{type(model).__name__} offers no decoder (`get_decoder()`).")
    return decoder


class _Output(BaseModelOutputWithPastAndCrossAttentions):
    """An output that has nothing of what a head may ask for but the last hidden states."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Facade:
    """An object that looks like `target` but for the attributes given, and for what a call gives:
    lets a model's own `forward` run its head (soft caps, scaling and all) on hidden states that
    were computed elsewhere."""

    def __init__(self, target: Any, given: Any, **overrides: Any) -> None:
        self.__dict__.update(overrides, _target=target, _given=given)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_given"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def head_logits(model: PreTrainedModel, path: list[str], hidden: Tensor) -> Tensor:
    """Compute the logits `(B, T, V)` of last hidden states, through the model's own forward.

    Args:
        path: the names that lead from the model to its decoder.
        hidden: `(B, T, D)`.
    """
    given = _Output(last_hidden_state=hidden)
    stand_in = _Facade(model.get_submodule(".".join(path)), given)
    for depth in range(len(path) - 1, -1, -1):
        owner = model.get_submodule(".".join(path[:depth]))
        stand_in = _Facade(owner, given, **{path[depth]: stand_in})
    return type(model).forward(stand_in, inputs_embeds=hidden, use_cache=False).logits
