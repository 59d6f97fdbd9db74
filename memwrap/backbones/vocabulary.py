"""A token that the model does not have yet: an id, and embeddings that say nothing in particular."""

from __future__ import annotations

import torch
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
    before = model.get_input_embeddings().weight.shape[0]
    if size <= before:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    output = model.get_output_embeddings()
    modules = [model.get_input_embeddings(), *([output] if output is not None else [])]
    tensors = [t for m in modules for t in (m.weight, getattr(m, "bias", None)) if t is not None]
    for tensor in {id(t): t for t in tensors}.values():
        tensor[before:] = tensor[:before].double().mean(0).to(tensor.dtype)
