"""Rows of several documents: how they are said, read together, and refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memwrap.engine.inputs import check_inputs
from memwrap.engine.packed_documents import alike, documents_in, packed
from memwrap.testing.helpers import assert_close, needs_ids, wrapped
from memwrap.testing.test_packing import DOCUMENTS, flattened
from memwrap.training.batches import unpacked


def two_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and document numbers `(2, T)`: one row is padded on the left."""
    a, b, c, d = DOCUMENTS
    rows = [torch.cat([a, b, c]), torch.cat([c, d])]
    total = max(map(len, rows))
    text, mask, number = (torch.zeros(2, total, dtype=torch.long) for _ in range(3))
    for index, (row, parts) in enumerate(zip(rows, ((a, b, c), (c, d)), strict=True)):
        text[index, -len(row) :], mask[index, -len(row) :] = row, 1
        sizes = torch.tensor([len(p) for p in parts])
        number[index, -len(row) :] = torch.arange(len(parts)).repeat_interleave(sizes)
    return text, mask, number


def test_documents_are_said_in_any_of_three_ways() -> None:
    model = wrapped("landmark")
    ways = (
        {"return_position_ids": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"position_ids_start": 2, "return_flash_attn_kwargs": True},
    )
    with torch.no_grad():
        want = torch.cat([model(row[None]).logits for row in DOCUMENTS], 1)
        for way in ways:
            packed = flattened(**way)
            del packed["labels"]
            assert_close(model(**packed).logits, want, label=str(way))
            assert_close(model(**packed, logits_to_keep=12).logits, want[:, -12:])
            hidden = model.base_model(**packed).last_hidden_state
            assert_close(model.parts.head(hidden), want)
        text, mask, number = two_rows()
        out = model(text, attention_mask=mask, seq_idx=number)
        at = mask.bool()
        _, _, c, d = (len(row) for row in DOCUMENTS)
        keep = [*range(want.shape[1] - d), *range(want.shape[1] - d - c, want.shape[1])]
        assert_close(out.logits[at], want[0, keep])
        assert out.cache is None and float(out.logits[~at].abs().max()) == 0
        embeds = model.get_input_embeddings()(text)
        if not needs_ids(model):
            again = model(inputs_embeds=embeds, attention_mask=mask, seq_idx=number)
            assert_close(again.logits, out.logits)
        shifted = torch.cat([text[:, 1:], text[:, :1]], 1)
        own = model(text, attention_mask=mask, seq_idx=number, shift_labels=shifted)
        nll = torch.nn.functional.cross_entropy(out.logits[at], shifted[at])
        assert own.loss.item() == pytest.approx(nll.item(), rel=1e-5)


def test_one_document_is_no_packed_row() -> None:
    real = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert documents_in(real) is None
    # Positions as generate makes them: anything at padding.
    assert documents_in(real, None, torch.tensor([[1, 0, 1, 2], [0, 1, 1, 1]])) is None
    assert documents_in(real, torch.tensor([[4, 7, 7, 7], [2, 2, 3, 3]])) is None
    found = documents_in(real, None, torch.tensor([[0, 0, 1, 0], [5, 6, 0, 0]]))
    assert found is not None
    assert [t.tolist() for t in found] == [[0, 0, 1], [1, 3, 0], [2, 1, 2]]


def test_documents_read_together_are_alike() -> None:
    lengths = [500, 3, 490, 4, 100, 400, 99, 1]
    columns = sum(lengths)
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    inputs = packed(check_inputs(torch.zeros_like(number), None, None), number)
    groups = [group.lengths.tolist() for group in alike(inputs)]
    assert groups == [[500, 490, 400], [100, 99], [3, 4], [1]]
    read = sum(len(g) * max(g) for g in groups)
    assert read < columns / 0.75


def test_a_trainers_batch_gets_a_row_a_document() -> None:
    batch = unpacked(flattened(return_flash_attn_kwargs=True, return_seq_idx=True))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in DOCUMENTS]
    for row, own, labels in zip(DOCUMENTS, batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(own[: len(row)], row)
        assert labels.tolist() == [-100, *row[1:].tolist()] + [-100] * (len(own) - len(row))
    alone = {"input_ids": DOCUMENTS[0][None], "position_ids": torch.arange(27)[None]}
    assert unpacked(alone) is alone


def test_what_does_not_go_with_packed_rows() -> None:
    model = wrapped("armt")
    packed = flattened()
    del packed["labels"]
    for more in (
        {"cache": model.new_state(1)},
        {"use_cache": True},
        {"memory_control": "off"},
    ):
        with pytest.raises(ValueError, match="begin anew and leave no state"):
            model(**packed, **more)
    with pytest.raises(ValueError, match="count_padding"):
        wrapped("rmt", count_padding=True)(**packed)
    text = packed["input_ids"]
    with pytest.raises(ValueError, match=r"`position_ids` has shape \(1, 3\)"):
        model(text, position_ids=torch.arange(3)[None])
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` .* single row, and there are 2"):
        model(text.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 4]))
