"""Rows that hold several documents, one behind the other: each is read as if it had a row alone.

Segments, blocks, positions and memories begin anew with every document, so that a row gives what
its documents give alone, with any memory. Documents of similar length are read together, as the
rows of a batch; whatever the lengths are, at most a quarter of what is read is padding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memwrap.engine.inputs import Inputs

# A document joins a group if it is at least so long as this share of the group's longest.
_ALIKE = 0.75


def packed(inputs: Inputs, *marks: Tensor | None) -> Inputs:
    """Make each document a text of its own, where rows hold several; `marks` as in
    `documents_in`."""
    documents = documents_in(inputs.real, *marks)
    if documents is None:
        return inputs
    rows, starts, lengths = documents
    return replace(inputs, rows=rows, starts=starts, lengths=lengths)


def alike(inputs: Inputs) -> list[Inputs]:
    """Group packed documents by similar length; texts that have a row each stay together."""
    if inputs.rows is None:
        return [inputs]
    groups: list[list[int]] = []
    longest = 0
    for n in inputs.lengths.argsort(descending=True, stable=True).tolist():
        length = int(inputs.lengths[n])
        if not groups or length < _ALIKE * longest:
            groups.append([])
            longest = length
        groups[-1].append(n)
    texts = inputs.rows, inputs.starts, inputs.lengths
    return [
        replace(inputs, rows=rows, starts=starts, lengths=lengths)
        for rows, starts, lengths in ([t[sorted(group)] for t in texts] for group in groups)
    ]


def documents_in(
    real: Tensor,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find the documents packed in the rows of a batch, by the first of the arguments that is
    given.

    Args:
        real: `(B, T)` bool, on the CPU; False is padding.
        seq_idx: `(B, T)`, a number for each document: another one begins where it changes.
        position_ids: `(B, T)` or `(1, T)`: a document begins where they do not go on by one.
        cu_seq_lens: `(N + 1,)`, where the documents of the only row begin, and its end.

    Returns:
        `(N,)` the row of each, its first column and its tokens; None if no row has more than one.

    Raises:
        ValueError: for another shape.
    """
    begins = torch.zeros_like(real)
    batch, total = real.shape
    if seq_idx is not None:
        seq_idx = _rows("seq_idx", seq_idx, batch, total)
        begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif cu_seq_lens is not None:
        inner = cu_seq_lens.cpu().long()
        if batch != 1 or inner.dim() != 1 or int(inner.max()) > total:
            raise ValueError(
                f"`cu_seq_lens_q` has shape {tuple(inner.shape)} and goes up to "
                f"{int(inner.max())}; it cuts the {total} columns of a single row, and there are "
                f"{batch}. Give `position_ids` or `seq_idx`."
            )
        begins[:, inner[inner < total]] = True
    elif position_ids is not None:
        position_ids = _rows("position_ids", position_ids, batch, total)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
    first = real & ~torch.nn.functional.pad(real[:, :-1], (1, 0))
    begins = (begins & real) | first
    if int(begins.sum()) == int(first.sum()):
        return None
    rows, starts = begins.nonzero(as_tuple=True)
    number = begins.flatten().long().cumsum(0) - 1
    lengths = torch.zeros_like(starts).index_add(0, number[real.flatten()], real[real].long())
    return rows, starts, lengths


def _rows(name: str, given: Tensor, batch: int, total: int) -> Tensor:
    if given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != total:
        raise ValueError(f"`{name}` has shape {tuple(given.shape)}, not ({batch}, {total}).")
    return given.cpu().expand(batch, -1)
