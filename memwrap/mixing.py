"""Logits and loss of hidden states, with the memory at the logits place mixed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memwrap.planning import Step
from memwrap.segments import Outcome, SegmentReader
from memwrap.trees import Tree

IGNORED = -100
# Logits of at most so many numbers (float32) exist at once while a loss is computed.
_LOGITS_AT_ONCE = 2**26


@dataclass
class Wanted:
    """What a step is to give: the loss of `targets` `(B, N)`, or what `collect` names of the
    columns from `first` on. `mixing`: the memory at the logits place takes part."""

    targets: Tensor | None
    collect: str
    first: int | None
    mixing: bool

    def places(self, step: Step) -> Tensor:
        """The step's columns of which logits are needed."""
        first = self.first if self.first is not None else int(step.columns.max()) + 1
        return ((step.columns >= 0) & (step.columns >= first)).any(0).nonzero().squeeze(1)

    def columns(self, step: Step) -> Tensor:
        """The input's columns `(B, n)` that the step's result stands for."""
        return step.columns[:, self.places(step)] if self.collect == "logits" else step.columns


class Head:
    """The backbone's head, and the memory at the logits place where there is one."""

    def __init__(self, reader: SegmentReader) -> None:
        self.backbone = reader.backbone
        self.mixer, self.inserting = reader.mixer, reader.inserting

    def logits(
        self, out: Outcome, places: Tensor, states: dict[str, Tree], *, mixing: bool = True
    ) -> Tensor:
        """Mixed logits `(B, n, V)` of the step's columns `places` `(n,)`.

        Args:
            out: what the step gave.
            states: the memories' trees before the step.
            mixing: whether the memory at the logits place takes part.
        """
        hidden, on = self._chosen(out, places)
        if not len(places):
            return hidden.new_zeros(hidden.shape[0], 0, self.backbone.config.vocab_size)
        logits = self.backbone.head(hidden)
        return self._mixed(logits, on, states).to(logits.dtype) if mixing else logits

    def _chosen(self, out: Outcome, places: Tensor) -> tuple[Tensor, Tensor]:
        places = places.to(out.hidden.device)
        on = out.hidden if out.mixed_on is None else out.mixed_on
        return out.hidden.index_select(1, places), on.index_select(1, places)

    def _mixed(self, logits: Tensor, on: Tensor, states: dict[str, Tree]) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.mixer is None:
            return logits
        name, memory = self.mixer
        return memory.mix(logits, on, states[name])

    def cross_entropy(
        self, out: Outcome, wanted: Tensor, states: dict[str, Tree], *, mixing: bool = True
    ) -> Tensor:
        """Summed cross entropy; logits exist for a part of the positions at a time. An inserted
        token that is a target of the token before it counts too.

        Args:
            out: what the step gave.
            wanted: `(B, N)` targets, -100 for none.
            states: the memories' trees before the step.
            mixing: whether the memory at the logits place takes part.
        """
        wanted = wanted.to(out.hidden.device)
        inserted = self._inserted(out, wanted)
        if self.mixer is None or not mixing:
            return self._plain(out.hidden, wanted) + inserted
        return self._mixing(out, wanted, states) + inserted

    def _inserted(self, out: Outcome, wanted: Tensor) -> Tensor | float:
        if out.named is None or self.inserting is None or self.inserting.insert_id is None:
            return 0.0
        hidden, where = out.named
        named = torch.full_like(wanted, self.inserting.insert_id)
        return self._plain(
            hidden, named.masked_fill(~where.to(wanted.device) | (wanted == IGNORED), IGNORED)
        )

    def _mixing(self, out: Outcome, wanted: Tensor, states: dict[str, Tree]) -> Tensor:
        places = (wanted != IGNORED).any(0).nonzero().squeeze(1)
        hidden, on = self._chosen(out, places)
        wanted = wanted.index_select(1, places)

        def part(h: Tensor, o: Tensor, t: Tensor) -> Tensor:
            logits = self._mixed(self.backbone.head(h), o, states).float()
            return F.cross_entropy(
                logits.flatten(0, 1), t.flatten(), reduction="sum", ignore_index=IGNORED
            )

        # Mixing holds some four tensors of the logits' size.
        size = max(1, _LOGITS_AT_ONCE // (4 * self.backbone.config.vocab_size * len(wanted)))
        pieces = list(zip(*[x.split(size, 1) for x in (hidden, on, wanted)], strict=True))
        if not len(places):
            return hidden.float().sum()
        if len(pieces) > 1 and torch.is_grad_enabled():
            return sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces)
        return sum(part(*piece) for piece in pieces)  # type: ignore[return-value]

    def _plain(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        chosen = wanted != IGNORED
        hidden, wanted = hidden[chosen], wanted[chosen]
        head = self.backbone.head

        def part(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(head(h[None])[0].float(), t, reduction="sum")

        size = max(1, _LOGITS_AT_ONCE // self.backbone.config.vocab_size)
        if hidden.shape[0] <= size:
            # Without targets the sum is a zero that still belongs to the graph.
            return part(hidden, wanted) if len(wanted) else hidden.float().sum()
        pairs = zip(hidden.split(size), wanted.split(size), strict=True)
        if torch.is_grad_enabled():
            return sum(checkpoint(part, h, t, use_reentrant=False) for h, t in pairs)
        return sum(part(h, t) for h, t in pairs)  # type: ignore[return-value]
