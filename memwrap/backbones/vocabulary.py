"""Tokens that a model does not have yet: an id, and embeddings that say nothing in particular."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Add a special token to a tokenizer and to a model's embeddings, and return its id.

    Its rows, input and output, are the mean of the others', without noise: on every machine the
    same. A token that the tokenizer has already keeps its id, and its rows if there are any.

    Args:
        model: a causal LM, before `wrap`.
        tokenizer: the one that goes with it.
        token: as it is written, such as `"<landmark>"`.
    """
    tokenizer.add_tokens([token], special_tokens=True)
    index = int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
    extend(model, index + 1)
    return index


@torch.no_grad()
def extend(model: PreTrainedModel, size: int) -> None:
    """Give the model embeddings for at least `size` ids; new rows are the mean of those there."""
    before = len(_tables(model)[0])
    if size <= before:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for table in _tables(model):
        table[before:] = table[:before].double().mean(0).to(table.dtype)


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """Return tensors with a row for every id: embeddings, and the head's where it has its own."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = [getattr(m, name, None) for m in modules for name in ("weight", "bias")]
    return list({id(t): t for t in tables if t is not None}.values())
