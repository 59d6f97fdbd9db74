"""Rows that hold several documents, one behind the other: each is read as if it had a row alone.

Segments, blocks, positions and memories begin anew with every document, so that a row gives what
its documents give alone, with any memory. Documents of similar length are read together, as the
rows of a batch; whatever the lengths are, at most a quarter of what is read is padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memwrap.engine.inputs import Inputs
from memwrap.engine.loop import Loop, Reading, assemble
from memwrap.engine.loss import IGNORED, Collect, Teacher, shift_targets
from memwrap.state.memory_state import MemoryState

# A document joins a group if it is at least so long as this share of the group's longest.
_ALIKE = 0.75


@dataclass(frozen=True)
class Documents:
    """The places of documents in the rows of a batch.

    Attributes:
        rows, starts, lengths: `(N,)`, the row of each, its first column and its tokens.
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor

    def index(self, which: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Find the tokens of some documents (default: of all), a document a row, aligned to the
        left: rows and columns `(N, W)`, and which of them are there."""
        rows, starts, lengths = (
            t if which is None else t[which] for t in (self.rows, self.starts, self.lengths)
        )
        inside = torch.arange(int(lengths.max()))
        real = inside < lengths[:, None]
        columns = starts[:, None] + inside * real
        return rows[:, None].expand_as(columns), columns, real

    def alike(self) -> list[Tensor]:
        """Group the documents by similar length."""
        groups: list[list[int]] = []
        longest = 0
        for n in self.lengths.argsort(descending=True, stable=True).tolist():
            length = int(self.lengths[n])
            if not groups or length < _ALIKE * longest:
                groups.append([])
                longest = length
            groups[-1].append(n)
        return [torch.tensor(sorted(group)) for group in groups]


def documents_in(
    real: Tensor,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Documents | None:
    """Find the documents packed in the rows of a batch, by the first of the arguments that is
    given.

    Args:
        real: `(B, T)` bool, on the CPU; False is padding.
        seq_idx: `(B, T)`, a number for each document: another one begins where it changes.
        position_ids: `(B, T)` or `(1, T)`: a document begins where they do not go on by one.
        cu_seq_lens: `(N + 1,)`, where the documents of the only row begin, and its end.

    Returns:
        None if no row has more than one.

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
    return Documents(rows, starts, lengths)


def _rows(name: str, given: Tensor, batch: int, total: int) -> Tensor:
    if given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != total:
        raise ValueError(f"`{name}` has shape {tuple(given.shape)}, not ({batch}, {total}).")
    return given.cpu().expand(batch, -1)


def targets_of(
    inputs: Inputs,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    documents: Documents | None = None,
) -> Tensor | None:
    """Make targets `(B, T)`, -100 for none: `shift_labels` as they are, or `labels` shifted inside
    each document; None without either.

    Raises:
        ValueError: for another shape than the input's.
    """
    given = shift_labels if shift_labels is not None else labels
    if given is None:
        return None
    if given.shape != inputs.real.shape:
        raise ValueError(
            f"The labels have shape {tuple(given.shape)}, the input {tuple(inputs.shape)}; "
            "they must agree."
        )
    if shift_labels is not None:
        return shift_labels.masked_fill(~inputs.real.to(shift_labels.device), IGNORED)
    if documents is not None:
        given = given.clone()
        given[documents.rows.to(given.device), documents.starts.to(given.device)] = IGNORED
    return shift_targets(given, inputs.real)


def unpacked(batch: dict[str, Any]) -> dict[str, Any]:
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
    rows, columns, there = documents.index()
    result: dict[str, Any] = {"attention_mask": there.long().to(tokens.device)}
    for name, value in batch.items():
        if name in (*names, "attention_mask", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            continue
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == shape:
            value = value[rows.to(value.device), columns.to(value.device)]
            if name in ("labels", "shift_labels"):
                value = value.masked_fill(~there.to(value.device), IGNORED)
        result[name] = value
    return result


class PackedLoop:
    """A loop that reads the documents of a call in groups, each with a fresh state; called as
    `Loop`.

    Args:
        new_loop: makes the loop of one group.
        new_state: makes the state of so many rows.
        inputs: the call's, with packed rows.
        documents: where they lie.

    Raises:
        ValueError: where rows are cut by columns (`count_padding`).
    """

    def __init__(
        self,
        new_loop: Callable[[], Loop],
        new_state: Callable[[int], MemoryState],
        inputs: Inputs,
        documents: Documents,
    ) -> None:
        first = new_loop()
        if first.reader.count_padding:
            raise ValueError(
                "`count_padding` cuts rows by columns, padding included, and documents packed in "
                "one row begin anew; turn it off, or give every document a row."
            )
        self.new_state, self.backbone = new_state, first.reader.backbone
        self.groups = []
        for which in documents.alike():
            rows, columns, real = index = documents.index(which)
            at = rows.to(inputs.device), columns.to(inputs.device)
            ids, embeds = (None if x is None else x[at] for x in (inputs.ids, inputs.embeds))
            own = Inputs(ids, embeds, real, [0] * len(which), real.sum(1).tolist())
            self.groups.append((index, own, new_loop()))

    def __call__(
        self,
        inputs: Inputs,
        state: Any,
        *,
        targets: Tensor | None = None,
        teacher: Teacher | None = None,
        hidden_from: int | None = None,
        collect: Collect = Collect.HIDDEN,
        keep_open: bool = False,
        control: Any = None,
    ) -> Reading:
        """Read all documents; arguments and result are those of `Loop`, columns are those of the
        packed rows. No state is left to continue: `state` comes back.

        Raises:
            ValueError: where a state was to be kept or another memory to be read.
        """
        if keep_open or control is not None:
            raise ValueError(
                "Documents packed in one row begin anew and leave no state: they do not go with "
                "`cache`, `use_cache=True` or `memory_control`. Give each a row."
            )
        pieces: list[tuple[Tensor, Tensor]] = []
        loss_sum: Any = None
        count = 0
        for (rows, columns, real), own, loop in self.groups:
            fresh = self.new_state(len(rows))
            fresh.hold_open = state.hold_open
            wanted = taught = None
            if targets is not None:
                at = rows.to(targets.device), columns.to(targets.device)
                wanted = targets[at].masked_fill(~real.to(targets.device), IGNORED)
            if teacher is not None:
                device = teacher.hidden.device
                own_hidden = teacher.hidden[rows.to(device), columns.to(device)]
                taught = replace(teacher, hidden=own_hidden)
            reading = loop(
                own, fresh, targets=wanted, teacher=taught,
                hidden_from=None if hidden_from is None else 0, collect=collect, keep_open=False,
            )  # fmt: skip
            if wanted is not None:
                loss_sum = reading.loss_sum if loss_sum is None else loss_sum + reading.loss_sum
                count += reading.targets
            elif hidden_from is not None:
                seen = real & (columns >= hidden_from)
                index = torch.stack([rows[seen], columns[seen]], 1)
                pieces.append((reading.hidden[seen.to(reading.hidden.device)], index))  # type: ignore
        hidden = None
        if hidden_from is not None:
            hidden = assemble(pieces, inputs, hidden_from, self.backbone, collect)
        return Reading(hidden, loss_sum, count, state)
