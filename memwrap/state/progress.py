"""How much the rows of a state have read, as attention counts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """The columns that attention has met, those of soft prompts among them, of which only the most
    there can be is known.

    Attributes:
        closed: `(B,)` each, the least and the most in closed segments.
        read: with the open one.
        open: `(B,)` positions that the open segment has so far.
    """

    closed: tuple[Tensor, Tensor]
    read: tuple[Tensor, Tensor]
    open: Tensor

    @classmethod
    def of(cls, state: Any, prefix: int = 0, suffix: int = 0, by_columns: bool = False) -> Progress:
        """Derive it from a state's counters.

        Args:
            state: a `MemoryState`.
            prefix, suffix: most columns that soft prompts add to a segment.
            by_columns: padding fills segments too (`count_padding`).
        """
        seen, more = state.tokens_seen, state.segments * (prefix + suffix)
        least = most = seen - state.fill
        if by_columns:  # `fill` counts padding
            open_tokens = state.open.valid.sum(1)
            least, most = (seen - n.clamp_min(0) for n in (open_tokens, open_tokens - prefix))
        columns = torch.where(state.open.valid, state.open.positions + 1, 0)
        opened = torch.nn.functional.pad(columns, (1, 0)).amax(1)
        closed, read = (least.clamp_min(0), most.clamp_min(0) + more), (seen, seen + more + prefix)
        return cls(closed, read, opened)
