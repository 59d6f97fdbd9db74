"""Batches as the trainer cuts them: aligned to the left, trimmed, split into pieces.

A batch is the dict that a collator returns. Tensors whose first dimensions are `(B, T)` go
with the tokens; everything else is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memwrap.engine.inputs import IGNORED
from memwrap.engine.packed_documents import documents_in
from memwrap.engine.plan import segment_lengths

Batch = dict[str, Any]


def shape_of(batch: Batch) -> torch.Size:
    """Give the shape `(B, T)` of the batch's tokens.

    Raises:
        ValueError: if it holds neither `input_ids` nor `inputs_embeds`.
    """
    tokens = batch.get("input_ids")
    if tokens is None:
        tokens = batch.get("inputs_embeds")
    if tokens is None:
        raise ValueError(
            f"The batch holds {', '.join(sorted(batch)) or 'nothing'}; "
            "it must hold `input_ids` or `inputs_embeds`."
        )
    return tokens.shape[:2]


def has_labels(batch: Batch) -> bool:
    """Tell whether the batch says what to predict."""
    return batch.get("labels") is not None or batch.get("shift_labels") is not None


def lengths_of(batch: Batch) -> Tensor:
    """Count the real tokens of each row, `(B,)`."""
    rows, columns = shape_of(batch)
    mask = batch.get("attention_mask")
    return torch.full((rows,), columns) if mask is None else mask.long().sum(1)


def _map_tokens(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    shape = shape_of(batch)
    return {
        name: function(value)
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == shape
        else value
        for name, value in batch.items()
    }


def left_aligned(batch: Batch) -> Batch:
    """Start every row with its first real token; padding follows, without labels.

    Columns that are padding in every row are dropped, so that one column means the same
    place of the document in each row. An aligned batch comes back equal.

    Raises:
        ValueError: if a mask is not `(B, T)` or has a hole.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    shape = shape_of(batch)
    if mask.shape != shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}; it must be {tuple(shape)}, "
            "like the tokens."
        )
    mask = mask.bool()
    first = mask.long().argmax(1)
    columns = torch.arange(shape[1], device=mask.device)
    order = (columns + first[:, None]) % shape[1]
    rows = torch.arange(shape[0], device=mask.device)[:, None]
    mask = mask[rows, order]
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "`attention_mask` has a hole between real tokens; padding may stand only before "
            "or after them."
        )
    width = max(int(mask.sum(1).max()), 1)
    batch = _map_tokens(batch, lambda t: t[rows.to(t.device), order.to(t.device)][:, :width])
    for name in ("labels", "shift_labels"):
        if batch.get(name) is not None:
            padding = ~mask[:, :width].to(batch[name].device)
            batch[name] = batch[name].masked_fill(padding, IGNORED)
    return batch


def first_tokens(batch: Batch, count: int) -> Batch:
    """Keep only the first `count` columns of an aligned batch."""
    if shape_of(batch)[1] <= count:
        return batch
    batch = _map_tokens(batch, lambda t: t[:, :count])
    if batch.get("shift_labels") is not None:
        # The target of the last column is a token that is no longer there.
        batch["shift_labels"] = batch["shift_labels"].clone()
        batch["shift_labels"][:, -1] = IGNORED
    return batch


def last_segment_only(
    batch: Batch, segment_size: int, alignment: str = "left", by_columns: bool = False
) -> Batch:
    """Keep the targets of each row's last segment and ignore the others.

    Args:
        batch: aligned, unless `by_columns`.
        segment_size: tokens of a segment.
        alignment: how rows are cut into segments.
        by_columns: segments are cut by columns, padding included (`count_padding`).
    """
    rows, columns = shape_of(batch)
    lengths = [columns] * rows if by_columns else lengths_of(batch).tolist()
    starts = [n - (segment_lengths(n, segment_size, alignment) or [0])[-1] for n in lengths]
    batch = dict(batch)
    # `labels[t]` is the target of position t - 1, `shift_labels[t]` that of position t.
    for name, shift in (("labels", 1), ("shift_labels", 0)):
        labels = batch.get(name)
        if labels is not None:
            places = torch.arange(columns, device=labels.device)
            first = torch.tensor(starts, device=labels.device)[:, None] + shift
            batch[name] = labels.masked_fill(places < first, IGNORED)
    return batch


def unpacked(batch: Batch) -> Batch:
    """Turn a trainer's batch into one with a row for every document, padded on the right, and the
    mask; one without packed documents comes back as it is.

    Args:
        batch: what a packing collator returned: `input_ids` or `inputs_embeds`, labels, and
            `seq_idx`, `cu_seq_lens_q` or `position_ids` that begin anew.
    """
    names = ("seq_idx", "position_ids", "cu_seq_lens_q")
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None or all(batch.get(name) is None for name in names):
        return batch
    shape, mask = tokens.shape[:2], batch.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    documents = documents_in(real, *(batch.get(name) for name in names))
    if documents is None:
        return batch
    rows, starts, lengths = (t[:, None] for t in documents)
    inside = torch.arange(int(lengths.max()))
    present = inside < lengths
    columns = starts + inside * present
    rows = rows.expand_as(columns)
    result: Batch = {"attention_mask": present.long().to(tokens.device)}
    for name, value in batch.items():
        if name in (*names, "attention_mask", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            continue
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == shape:
            value = value[rows.to(value.device), columns.to(value.device)]
            if name in ("labels", "shift_labels"):
                value = value.masked_fill(~present.to(value.device), IGNORED)
        result[name] = value
    return result


def shifted_labels(batch: Batch) -> Tensor:
    """Make the target of every position, `(B, T)`: the labels, shifted once over whole rows."""
    given = batch.get("shift_labels")
    if given is not None:
        return given
    return torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def pieces(batch: Batch, length: int) -> Iterator[tuple[Tensor, Batch]]:
    """Cut an aligned batch into pieces of at most `length` columns, labels shifted before.

    Yields:
        The rows `(N,)` that still have tokens there, in order, and their piece, with
        `shift_labels` instead of `labels`.
    """
    batch = {**batch, "shift_labels": shifted_labels(batch)}
    batch.pop("labels", None)
    lengths = lengths_of(batch)
    for start in range(0, shape_of(batch)[1], length):
        rows = (lengths > start).nonzero().squeeze(1).cpu()

        def cut(t: Tensor, rows: Tensor = rows, start: int = start) -> Tensor:
            return t[rows.to(t.device), start : start + length]

        yield rows, _map_tokens(batch, cut)


__all__ = [
    "IGNORED",
    "first_tokens",
    "has_labels",
    "last_segment_only",
    "left_aligned",
    "lengths_of",
    "pieces",
    "shape_of",
    "shifted_labels",
    "unpacked",
]
