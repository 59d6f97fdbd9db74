"""Whether a decoder reads as memwrap lets it: a row of tokens as ids and as embeddings, in pieces
on a cache, and behind padding, must give the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from memwrap.backbones.masks import KINDS, layer_kinds
from memwrap.backbones.recurrence import Recurrence

if TYPE_CHECKING:
    from memwrap.backbones.backbone import Backbone

TOKENS, FIRST, PADDING = 10, 6, 3
_SLIDING, _WINDOW = KINDS[1], 3


def sample_ids(vocab_size: int, tokens: int = TOKENS) -> Tensor:
    """Choose ids `(1, tokens)` from all over the vocabulary."""
    return (torch.arange(1, tokens + 1) * 0.618 % 1 * vocab_size).long()[None]


def alike(got: Tensor, want: Tensor) -> bool:
    """Compare last hidden states `(1, T, D)`: whether those of most tokens agree. An expert chosen
    by a hair changes a token or two; what is wrong in kind changes most of them."""
    close = 0.01 if want.dtype.itemsize > 2 else 0.1  # float32 leaves some 1e-6, bf16 0.01
    got, want = got.float(), want.float()
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-12)
    return bool(errors.median() <= close)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block with a model in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def looks_at_ids(decoder: nn.Module, ids: Tensor, embeds: Tensor, noise: Tensor) -> bool:
    """Tell whether a decoder looks at ids beside their embeddings.

    Args:
        ids: `(1, T)`; embeds: `(1, T, D)` theirs; noise: `(1, T, D)` no ids'.
    """
    where = {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None]}
    try:
        want = decoder(input_ids=ids, use_cache=False, **where).last_hidden_state
    except TypeError:  # it takes none
        return False
    try:  # noise beside them: a decoder may look for the ids that embeddings belong to
        got = decoder(inputs_embeds=torch.cat([embeds, noise]), use_cache=False, **where)
    except (RuntimeError, ValueError):
        return True
    return not alike(got.last_hidden_state[:1], want)


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn what a foreign architecture raises in the block, of any kind, into a `ValueError` that
    says whose it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and _is_own(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{name} cannot read text as memwrap lets a backbone read it: {type(error).__name__} "
            f"({reason})."
        ) from error


def _is_own(error: Exception) -> bool:
    """Tell whether an error was raised by memwrap itself."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = "" if frame is None else frame.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] == __name__.partition(".")[0]


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    try:
        return model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # of a foreign architecture, of every kind
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} does not read text alone ({reason}).") from error


def _check_window(backbone: Backbone, run: Any, plain: Any) -> None:
    """Refuse a model whose config names a window that its own masks do not have: its cache would
    forget what it sees without one. The window is made narrow to be seen in a few tokens."""
    config = backbone.config
    if _SLIDING not in layer_kinds(config):
        return
    wide = config.sliding_window
    config.sliding_window = _WINDOW
    try:
        same = alike(plain(), run(0, TOKENS, {}, None)[0])
    finally:
        config.sliding_window = wide
    if not same:
        raise ValueError(
            f"{type(backbone.model).__name__} sees beyond its config's `sliding_window` ({wide}); "
            "set that to None before the model is built, or take another backbone."
        )


def check_reading(backbone: Backbone) -> None:
    """Refuse a model that memwrap would read segments with wrongly.

    Args:
        backbone: its recurrent layers attached.

    Raises:
        ValueError: says what it does otherwise.
    """
    name = type(backbone.model).__name__
    ids = sample_ids(backbone.embedding_weight.shape[0]).to(backbone.device)
    embeds, places = backbone.embed(ids), torch.arange(TOKENS)[None]
    valid = torch.ones(1, TOKENS, dtype=torch.bool)

    def run(start: int, stop: int, states: dict, cache: DynamicCache | None) -> tuple[Tensor, dict]:
        recurrence = Recurrence(states, valid[:, start:stop]) if backbone.recurrent else None
        hidden = backbone.run(
            embeds[:, start:stop], places[:, start:stop], ids=ids[:, start:stop],
            key_positions=places[:, :stop], key_valid=valid[:, :stop],
            cache=cache, recurrence=recurrence,
        )  # fmt: skip
        return hidden, {} if recurrence is None else recurrence.after

    want = run(0, TOKENS, {}, None)[0]
    if want.shape[-1] != embeds.shape[-1]:
        raise ValueError(
            f"{name} embeds tokens in {embeds.shape[-1]} numbers and gives last hidden states of "
            f"{want.shape[-1]}; memwrap needs as many."
        )
    _check_window(backbone, run, lambda: backbone.run(embeds, places, ids=ids))
    model_logits, made = _own_logits(backbone.model, ids), backbone.head(want)
    other = _own_logits(backbone.model, torch.cat([ids[:, :-1], ids[:, :1]], 1))
    if not alike(other[:, :-1], model_logits[:, :-1]):
        raise ValueError(
            f"{name} lets tokens of a text see those behind them; memwrap reads from left to right "
            "and needs a causal LM."
        )
    if made is None or made.shape != model_logits.shape or not alike(made, model_logits):
        raise ValueError(
            f"{name} does not give for a text what its decoder, read from left to right, and its "
            "head give; memwrap cannot read with it."
        )
    cache = DynamicCache()
    _, states = run(0, FIRST, {}, cache)
    if not alike(run(FIRST, TOKENS, states, cache)[0], want[:, FIRST:]):
        raise ValueError(
            f"{name} reads a text in pieces otherwise than at once; memwrap cannot carry its "
            "segments on."
        )
    embeds = torch.cat([embeds[:, :1].expand(-1, PADDING, -1), embeds], 1)
    ids = torch.cat([ids[:, :1].expand(-1, PADDING), ids], 1)
    valid = torch.cat([valid[:, :PADDING].logical_not(), valid], 1)
    places = torch.cat([places[:, :1].expand(-1, PADDING), places], 1)
    if not alike(run(0, PADDING + TOKENS, {}, None)[0][:, PADDING:], want):
        raise ValueError(
            f"{name} does not read a text behind padding as alone; memwrap cannot batch its "
            "segments."
        )
