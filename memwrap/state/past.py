"""Taking back what a state has read: open columns are dropped, closed ones are read again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from memwrap.state.memory_state import MemoryState

_ADVICE = "Keep a clone() and go back to it."


@dataclass(frozen=True)
class Recorded:
    """The ids that a state has read since its last `crop`, and the state before them.

    Attributes:
        before: the state at that time. Tensors are shared: it costs what was written since.
        ids: `(B, T)` the ids read since.
    """

    before: MemoryState
    ids: Tensor

    @classmethod
    def after(cls, state: MemoryState, ids: Tensor | None) -> Recorded | None:
        """Continue the record of `state`, before a call, by the call's ids; None for embeddings,
        which no record can read again."""
        if ids is None:
            return None
        if state.recorded is None:
            return cls(state.clone(), ids)
        return cls(state.recorded.before, torch.cat([state.recorded.ids.to(ids.device), ids], 1))


def cropped(state: MemoryState, tokens_to_remove: int) -> MemoryState:
    """Make a state without the last tokens of every row.

    Args:
        state: left as it is.
        tokens_to_remove: minus their number, as transformers counts.

    Raises:
        ValueError: if the number cannot be taken back.
    """
    # Older releases of transformers count in a tensor.
    count, length = -int(tokens_to_remove), state.get_seq_length()
    if not 0 <= count <= length:
        raise ValueError(
            f"crop got {tokens_to_remove}; it needs minus the number of tokens to take back, of "
            f"the {length} that were read."
        )
    new, recorded, owed = state.clone(), state.recorded, state.owed
    if count == 0:
        return new
    if owed is not None and count <= owed.shape[1]:
        new.owed = _first(owed, owed.shape[1] - count)
        return new
    known = recorded is not None and count <= recorded.ids.shape[1]
    kept = _first(recorded.ids, recorded.ids.shape[1] - count) if known else None  # type: ignore
    if owed is None and count <= state.droppable:
        new.fill, new.tokens_seen = state.fill - count, state.tokens_seen - count
        new.open = state.open.cropped(new.fill)
        new.columns -= count
        taken = torch.ones(state.batch_size, count)
        new.mask_hash = state.mask_hash - state.mask_hash_of(taken, new.columns)
        new.ids_hash = recorded.before.hash_after(kept) if known else None  # type: ignore
        return new
    if not known:
        raise ValueError(
            f"{count} tokens cannot be taken back, only the {state.droppable} of the open segment. "
            + _ADVICE
        )
    new = recorded.before.clone()  # type: ignore[union-attr]
    new.owed = kept
    return new


def _first(ids: Tensor, count: int) -> Tensor | None:
    return ids[:, :count] if count else None
