"""Invariant 2 again, for rows of several documents: each gives what it gives in a row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from memwrap.testing.helpers import (
    SEGMENT,
    TOLERANCE,
    assert_close,
    assert_same_gradients,
    error_of,
    gradients,
    ids,
    pairs,
    wrapped,
)

# Longer than a segment and shorter, of one token, cut where segments would be and elsewhere.
DOCUMENTS = [ids(n, seed=n) for n in (3 * SEGMENT + 3, 1, 2 * SEGMENT, SEGMENT + 1)]


def flattened(**settings: Any) -> dict[str, Any]:
    """One row, as transformers' own collator packs it."""
    collate = DataCollatorWithFlattening(**settings)
    return collate([{"input_ids": row.tolist()} for row in DOCUMENTS])


def split(x: Tensor) -> tuple[Tensor, ...]:
    return x.split([len(row) for row in DOCUMENTS], 1)


@pytest.mark.long
@pairs()
def test_a_packed_row_gives_what_its_documents_give(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    packed = flattened()
    with torch.no_grad():
        text = {name: packed[name] for name in ("input_ids", "position_ids")}
        got = split(model(**text).logits)
        for row, logits in zip(DOCUMENTS, got, strict=True):
            assert_close(logits, model(row[None]).logits, label=f"document of {len(row)}")
        mixed = model(packed["input_ids"]).logits
    assert error_of(split(mixed)[2], got[2]) > 1e-2  # as one document it is another text
    model.train()
    total = 0.0
    for row in DOCUMENTS:
        loss = model(row[None], labels=row[None], num_items_in_batch=1).loss
        total += loss.item()
        loss.backward()
    want = gradients(model)
    summed = model(**packed, num_items_in_batch=1).loss
    summed.backward()
    assert summed.item() == pytest.approx(total, rel=1e-5)
    assert_same_gradients(gradients(model), want, 10 * TOLERANCE)
    # A label at a document's first token is no target of the document before it.
    mean = model(**{**packed, "labels": packed["input_ids"]}).loss
    count = sum(len(row) - 1 for row in DOCUMENTS)
    assert mean.item() == pytest.approx(total / count, rel=1e-5)
