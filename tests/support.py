"""Shared by the tests of this repository; what the invariants need is in `memwrap.testing`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.assets import asset
from memwrap.testing.helpers import assert_close, assert_same_states, ids, padded

MEMORIES = tuple(memwrap.available())


def crossed(
    variants: Sequence[Any], others: Sequence[Any], each: int, name: Callable[[Any], str] = str
) -> list[Any]:
    """Pairs of a variant and another choice, say a family: for every variant so many of the others,
    in turn, so that every one of them is met; the rest is `slow`."""
    step = len(others) // each
    return [
        pytest.param(
            variant, other, id=f"{name(variant)}-{name(other)}",
            marks=() if (place - index) % len(others) in range(0, step * each, step)
            else pytest.mark.slow,
        )
        for index, variant in enumerate(variants)
        for place, other in enumerate(others)
    ]  # fmt: skip


def with_masks(base: Any, text: Tensor, mask_of: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Logits of a base where every layer's attention has a mask of its own: the naive statement.

    Args:
        mask_of: of a layer's number and its attention's input `(B, T, D)`: who sees whom, bool
            `(B or 1, H or 1, T, T)`.
    """
    hooks, least = [], torch.finfo(torch.float32).min
    for number, layer in enumerate(base.model.layers):

        def put(module: Any, args: Any, kwargs: Any, number: int = number) -> Any:
            seen = mask_of(number, kwargs.get("hidden_states", args[0] if args else None))
            mask = torch.where(seen, 0.0, least).expand(len(text), -1, -1, -1)
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    try:
        with torch.no_grad():
            return base(text).logits
    finally:
        for hook in hooks:
            hook.remove()


def save_small_base(folder: Path) -> Path:
    """A tiny random Llama with the shipped tokenizer, saved as any model is."""
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assert_pieces_and_padding(model: Any, lengths: Sequence[int] = (43, 29)) -> None:
    """Two rows of text, padded on the left, give what each gives alone; the first in pieces of
    seven tokens gives what it gives in one call, logits and state."""
    rows = [ids(n, seed=seed) for seed, n in enumerate(lengths, 1)]
    with torch.no_grad():
        wanted = [model(row[None], use_cache=True) for row in rows]
        text, mask = padded(rows, "left")
        got = model(text, attention_mask=mask).logits
        for index, (row, want) in enumerate(zip(rows, wanted, strict=True)):
            assert_close(got[index, -len(row) :], want.logits[0], label="a padded row")
        state = model.new_state(1)
        pieces = [model(p[None], cache=state).logits for p in rows[0].split(7)]
        assert_close(torch.cat(pieces, 1), wanted[0].logits, label="pieces")
        assert_same_states(state, wanted[0].cache)


USER_ERRORS = (ValueError, TypeError, FileNotFoundError)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block raises a short error whose text holds all the words (regular expressions)."""
    with pytest.raises(USER_ERRORS) as caught:
        yield
    text = str(caught.value)
    assert len(text.splitlines()) <= 2 and len(text) <= 320, f"too long: {text}"
    assert len(text) >= 20, f"too short: {text}"
    for word in words:
        assert re.search(word, text, re.IGNORECASE), f"{word!r} is not in: {text}"
