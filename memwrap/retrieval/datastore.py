"""Building a kNN-LM's datastore: (key at a token, next token) of every token of a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from memwrap.data.stdlib_corpus import Document
from memwrap.engine.inputs import check_inputs
from memwrap.engine.loss import Collect
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.stores import FaissStore, Store

NAME = "knnlm"
ROWS = 16
"""Segments that are read at once where nothing passes from one to the next."""


@torch.no_grad()
def read_tokens(
    model: MemoryModelForCausalLM, ids: Tensor, collect: Collect = Collect.KEYS
) -> Iterator[tuple[int, Tensor]]:
    """Read a document, in pieces: yields what stands for each token.

    Args:
        model: a memwrap model with a kNN-LM memory.
        ids: `(T,)`.
        collect: the keys that the memory searches with, or the last hidden states.

    Yields:
        The first token of a piece, and `(n, D)`.
    """
    loop, size = model.loop(), model.segment_size
    ids = ids.to(model.device)
    piece = ROWS * size
    # Without another memory a segment knows nothing of those before it: all are read side by side.
    apart = set(model.memories) == {NAME}
    state = None if apart else model.new_state(1)
    for first in range(0, len(ids), piece):
        part = ids[first : first + piece]
        if apart:
            count = -(-len(part) // size)
            rows = torch.nn.functional.pad(part, (0, count * size - len(part))).view(count, size)
            real = (torch.arange(count * size, device=ids.device) < len(part)).view(count, size)
            inputs, state = check_inputs(rows, None, real), model.new_state(count)
        else:
            inputs = check_inputs(part[None], None, None)
        reading = loop(inputs, state, hidden_from=0, collect=collect, keep_open=not apart)  # type: ignore[arg-type]
        state = reading.state
        yield first, reading.hidden.flatten(0, 1)[: len(part)]  # type: ignore[union-attr]


def add_document(
    model: MemoryModelForCausalLM,
    store: Store,
    ids: Tensor,
    name: str | None = None,
    cursor: Any = None,
) -> int:
    """Add a document's entries, all at once. The last token has no next one and gives none.

    Args:
        model: a memwrap model with a kNN-LM memory.
        store: takes the entries; spans are the places of the next tokens.
        ids: `(T,)`.
        name, cursor: see `Store.add`.

    Returns:
        Entries added.
    """
    ids = torch.as_tensor(ids)
    keys = [k.cpu() for _, k in read_tokens(model, ids)]
    count = len(ids) - 1
    if count < 1:
        return 0
    places = torch.arange(1, count + 1)
    store.add(
        torch.cat(keys)[:count],
        values=ids[1:].cpu().numpy(),
        document=name,
        spans=torch.stack([places, places + 1], 1).numpy(),
        cursor=cursor,
    )
    return count


def build_store(
    model: MemoryModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    store: Store,
    *,
    tokens: int | None = None,
    source: str = "",
    progress: bool = True,
) -> int:
    """Fill a store with documents, and build its index. A build that was stopped goes on.

    Args:
        model: a memwrap model with a kNN-LM memory.
        tokenizer: the model's.
        documents: always the same, in the same order.
        store: empty, or one of the same model and documents that was not finished.
        tokens: stop after the document with which so many entries are there.
        source: what the documents are; noted in the store.
        progress: show bars.

    Returns:
        Entries in the store.

    Raises:
        ValueError: if the store is of another model or other documents.
    """
    config: Any = model.memories[NAME].config
    about = {
        "key": config.key, "source": source,
        "segment_size": model.segment_size, "model": model.fingerprint(),
    }  # fmt: skip
    for name, value in about.items():
        if len(store) and store.notes.get(name, value) != value:
            raise ValueError(
                f"The store was begun with another {name} ({store.notes[name]!r}, now {value!r}); "
                "give another folder."
            )
    store.note(about)
    first = (store.cursor or {}).get("documents", 0)
    was_training = model.training
    model.eval()
    bar = tqdm(documents, desc="documents", disable=not progress)
    try:
        for number, document in enumerate(bar):
            if number < first:
                continue
            if tokens is not None and len(store) >= tokens:
                break
            ids = tokenizer(document.text, verbose=False)["input_ids"]
            ids = torch.tensor(ids, dtype=torch.long)
            add_document(model, store, ids, document.name, {"documents": number + 1})
            bar.set_postfix(entries=f"{len(store):,}", refresh=False)
    finally:
        bar.close()
        model.train(was_training)
    if isinstance(store, FaissStore):
        store.build(progress=progress)
    else:
        store.commit()
    return len(store)
