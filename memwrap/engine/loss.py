"""Logits and loss of hidden states, with the memory at the logits mixed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.engine.inputs import IGNORED, Teacher
from memwrap.engine.mixer_matching import matching_mixers
from memwrap.engine.plan import Step
from memwrap.engine.recomputation import recomputed
from memwrap.engine.step import SegmentReader, StepOutput
from memwrap.ops import accumulation_dtype
from memwrap.state.trees import Tree

# Logits of at most so many numbers (float32) exist at once while a loss is computed.
_LOGITS_AT_ONCE = 2**26


class Collect(Enum):
    """The thing that a call collects of its columns: last hidden states, mixed logits, or the keys
    that the memory at the logits is given."""

    HIDDEN = "hidden"
    LOGITS = "logits"
    KEYS = "keys"


class Head:
    """The backbone's head, and the memory at the logits where there is one: what is asked of a
    step's output.

    Args:
        reader: runs the steps.
        mixing: whether the memory at the logits takes part.
    """

    def __init__(self, reader: SegmentReader, mixing: bool) -> None:
        self.backbone, self.insertion = reader.backbone, reader.layout.insertion
        self.mixer = reader.mixer if mixing else None

    def collect(
        self, first: int, collect: Collect, out: StepOutput, step: Step, states: dict[str, Tree]
    ) -> tuple[Tensor, Tensor]:
        """Collect what is wanted of a step from the call's column `first` on.

        Args:
            first, collect: what is wanted.
            out, step: the step's output, and the step.
            states: the memories' trees before it.

        Returns:
            `(n, ...)`, and the row and column of each, `(n, 2)`.
        """
        wanted = step.columns >= first
        index = torch.stack([step.rows[:, None].expand_as(wanted)[wanted], step.columns[wanted]], 1)
        values = out.key if collect is Collect.KEYS and out.key is not None else out.hidden
        if collect is Collect.LOGITS:
            tokens = wanted.any(0).nonzero().squeeze(1)
            values, wanted = self._logits(out, tokens, states), wanted[:, tokens]
        rows, places = (i.to(values.device) for i in wanted.nonzero(as_tuple=True))
        return values[rows, places], index

    def loss(
        self,
        targets: Tensor,
        teacher: Teacher | None,
        out: StepOutput,
        step: Step,
        states: dict[str, Tree],
    ) -> tuple[Tensor, int]:
        """Sum the loss of a step: cross entropy, the divergence from the teacher where there is
        one, and the memories' own losses once for each target; where mixers are compared these
        are all of it. An inserted token that is a target
        of the token before it counts too. Logits exist for a part of the positions at a time.

        Args:
            targets: `(B, T)` the id that each column of the call predicts.
            teacher: of the call's columns.
            out, step, states: as in `collect`.

        Returns:
            The sum, and how many inserted tokens are targets.
        """
        targets = step.take(targets, IGNORED)
        if teacher is not None:
            teacher = replace(teacher, hidden=step.take(teacher.hidden))
        wanted = targets.to(out.hidden.device)
        if matching_mixers():
            loss = torch.zeros((), device=out.hidden.device)
        elif self.mixer is None:
            loss = self._plain(out.hidden, wanted, teacher)
        else:
            loss = self._mixing(out, wanted, states, teacher)
        if out.inserted is not None:
            hidden, ends = out.inserted
            absent = ~ends.to(wanted.device) | (wanted == IGNORED)
            ids = torch.full_like(wanted, self.insertion.id)  # type: ignore[arg-type]
            loss = loss + self._plain(hidden, ids.masked_fill(absent, IGNORED))
        if out.auxiliary is not None:
            loss = loss + (out.auxiliary * (targets != IGNORED).sum(1).to(out.auxiliary)).sum()
        return loss, self.insertion.count(step, targets != IGNORED)

    def _logits(self, out: StepOutput, tokens: Tensor, states: dict[str, Tree]) -> Tensor:
        """Compute the mixed logits `(B, n, V)` of the step's tokens numbered `tokens` `(n,)`."""
        hidden, key = self._chosen(out, tokens)
        if not len(tokens):
            return hidden.new_zeros(hidden.shape[0], 0, self.backbone.config.vocab_size)
        logits = self.backbone.head(hidden)
        return self._mixed(logits, key, states).to(logits.dtype)

    def _chosen(self, out: StepOutput, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(out.hidden.device)
        key = out.hidden if out.key is None else out.key
        return out.hidden.index_select(1, tokens), key.index_select(1, tokens)

    def _mixed(self, logits: Tensor, key: Tensor, states: dict[str, Tree]) -> Tensor:
        if self.mixer is None:
            return logits
        name, memory = self.mixer
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return memory.mix(wide, key, states[name])

    def _of_tokens(
        self, logits: Tensor, targets: Tensor, taught: Tensor, teacher: Teacher | None
    ) -> Tensor:
        """Sum over tokens with a target: logits `(n, V)`, targets `(n,)`, and the teacher's hidden
        states `(n, D)`."""
        logits = logits.to(accumulation_dtype(logits))
        loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        if teacher is None:
            return loss
        loss, t = loss * teacher.labels, teacher.temperature
        with torch.no_grad():
            follow = F.log_softmax(self.backbone.head(taught[None])[0].to(logits.dtype) / t, -1)
        student = F.log_softmax(logits / t, -1)
        apart = F.kl_div(student, follow, reduction="none", log_target=True).sum(-1)
        return loss + teacher.weight * t * t * apart.masked_fill(targets == IGNORED, 0.0).sum()

    def _mixing(
        self, out: StepOutput, wanted: Tensor, states: dict[str, Tree], teacher: Teacher | None
    ) -> Tensor:
        tokens = (wanted != IGNORED).any(0).nonzero().squeeze(1)
        hidden, key = self._chosen(out, tokens)
        wanted = wanted.index_select(1, tokens)

        # Without a teacher its place is taken by what is not looked at.
        taught = hidden if teacher is None else teacher.hidden.to(hidden)[:, tokens]

        def part(h: Tensor, k: Tensor, t: Tensor, follow: Tensor) -> Tensor:
            logits = self._mixed(self.backbone.head(h), k, states)
            return self._of_tokens(logits.flatten(0, 1), t.flatten(), follow.flatten(0, 1), teacher)

        # Mixing holds some four tensors of the logits' size.
        return self._in_parts(part, 4 * len(wanted), 1, hidden, key, wanted, taught)

    def _plain(self, hidden: Tensor, wanted: Tensor, teacher: Teacher | None = None) -> Tensor:
        chosen = wanted != IGNORED
        hidden, wanted, taught = (
            hidden[chosen], wanted[chosen],
            hidden[chosen] if teacher is None else teacher.hidden.to(hidden)[chosen],
        )  # fmt: skip

        def part(h: Tensor, t: Tensor, follow: Tensor) -> Tensor:
            return self._of_tokens(self.backbone.head(h[None])[0], t, follow, teacher)

        return self._in_parts(part, 1, 0, hidden, wanted, taught)

    def _in_parts(
        self, part: Callable[..., Tensor], rows: int, dim: int, hidden: Tensor, *others: Tensor
    ) -> Tensor:
        """Sum `part` over pieces of the tensors' dimension `dim`, each so long that `rows` of them
        make no more logits than may exist at once."""
        if not hidden.shape[dim]:  # a zero that still belongs to the graph
            return hidden.float().sum()
        size = max(1, _LOGITS_AT_ONCE // (rows * self.backbone.config.vocab_size))
        pieces = list(zip(*[x.split(size, dim) for x in (hidden, *others)], strict=True))
        if len(pieces) > 1 and torch.is_grad_enabled():
            return sum(recomputed(part, *piece) for piece in pieces)
        return sum(part(*piece) for piece in pieces)  # type: ignore[return-value]
