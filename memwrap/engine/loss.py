"""Logits and loss of hidden states, with the memory at the logits mixed in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memwrap.engine.plan import Step
from memwrap.engine.recomputation import recomputed
from memwrap.engine.step import SegmentReader, StepOutput
from memwrap.state.trees import Tree

IGNORED = -100
# Logits of at most so many numbers (float32) exist at once while a loss is computed.
_LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Teacher:
    """Last hidden states of a model with the same head, whose distribution is to be followed.

    The loss of a target gets `weight * temperature^2 * KL(teacher || student)` beside the cross
    entropy, both distributions at that temperature (Hinton et al. 2015, arXiv 1503.02531).

    Attributes:
        hidden: `(B, T, D)` for every column.
        weight: of the divergence.
        temperature: by which both models' logits are divided.
        labels: weight of the cross entropy with the targets beside it.
    """

    hidden: Tensor
    weight: float = 1.0
    temperature: float = 1.0
    labels: float = 1.0

    def at(self, step: Step) -> Teacher:
        """Take the columns of a step."""
        columns = step.columns.clamp_min(0).to(self.hidden.device)
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return replace(self, hidden=self.hidden[rows, columns])


def check_teacher(teacher: Any, shape: tuple[int, ...]) -> Teacher | None:
    """Check the teacher of a call over `shape` `(B, T)` tokens; None is none.

    Raises:
        ValueError: if it is none, or of other tokens.
    """
    if teacher is None or (isinstance(teacher, Teacher) and teacher.hidden.shape[:2] == shape[:2]):
        return teacher
    got = tuple(teacher.hidden.shape) if isinstance(teacher, Teacher) else type(teacher).__name__
    raise ValueError(f"`teacher` is {got}; it must be a Teacher of {tuple(shape[:2])} tokens.")


class Collect(Enum):
    """The thing that a call collects of its columns: last hidden states, mixed logits, or the keys
    that the memory at the logits is given."""

    HIDDEN = "hidden"
    LOGITS = "logits"
    KEYS = "keys"


@dataclass(frozen=True)
class StepRequest:
    """A request to a step: for a loss, or for what is collected.

    Attributes:
        targets: `(B, N)` the id that each token predicts; None for no loss.
        collect: what is wanted of the call's columns from `first` on (None: of none).
        mixing: the memory at the logits takes part.
        teacher: of the step's columns.
    """

    targets: Tensor | None
    collect: Collect
    first: int | None
    mixing: bool
    teacher: Teacher | None = None

    def tokens(self, step: Step) -> Tensor:
        """List the numbers `(n,)` of the step's tokens whose logits are needed."""
        first = self.first if self.first is not None else int(step.columns.max()) + 1
        return ((step.columns >= 0) & (step.columns >= first)).any(0).nonzero().squeeze(1)

    def columns(self, step: Step) -> Tensor:
        """Give the input's columns `(B, n)` that the step's result stands for."""
        logits = self.collect is Collect.LOGITS
        return step.columns[:, self.tokens(step)] if logits else step.columns


class Head:
    """The backbone's head, and the memory at the logits where there is one."""

    def __init__(self, reader: SegmentReader) -> None:
        self.backbone = reader.backbone
        self.mixer, self.insertion = reader.mixer, reader.layout.insertion

    def logits(
        self, out: StepOutput, tokens: Tensor, states: dict[str, Tree], *, mixing: bool = True
    ) -> Tensor:
        """Compute the mixed logits `(B, n, V)` of the step's tokens numbered `tokens` `(n,)`.

        Args:
            out: what the step gave.
            states: the memories' trees before the step.
            mixing: whether the memory at the logits takes part.
        """
        hidden, key = self._chosen(out, tokens)
        if not len(tokens):
            return hidden.new_zeros(hidden.shape[0], 0, self.backbone.config.vocab_size)
        logits = self.backbone.head(hidden)
        return self._mixed(logits, key, states).to(logits.dtype) if mixing else logits

    def _chosen(self, out: StepOutput, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.to(out.hidden.device)
        key = out.hidden if out.key is None else out.key
        return out.hidden.index_select(1, tokens), key.index_select(1, tokens)

    def _mixed(self, logits: Tensor, key: Tensor, states: dict[str, Tree]) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.mixer is None:
            return logits
        name, memory = self.mixer
        return memory.mix(logits, key, states[name])

    def loss(self, out: StepOutput, want: StepRequest, states: dict[str, Tree]) -> Tensor:
        """Sum the cross entropy, and the divergence from the teacher where there is one; logits
        exist for a part of the positions at a time. An inserted token that is a target of the token
        before it counts too.

        Args:
            out: what the step gave.
            want: targets, teacher, and whether the memory at the logits takes part.
            states: the memories' trees before the step.
        """
        wanted: Tensor = want.targets.to(out.hidden.device)  # type: ignore[union-attr]
        inserted = self._inserted(out, wanted)
        if self.mixer is None or not want.mixing:
            return self._plain(out.hidden, wanted, want.teacher) + inserted
        return self._mixing(out, wanted, states, want.teacher) + inserted

    def _of_tokens(
        self, logits: Tensor, targets: Tensor, taught: Tensor | None, teacher: Teacher | None
    ) -> Tensor:
        """Sum over tokens with a target: logits `(n, V)`, targets `(n,)`, and the teacher's hidden
        states `(n, D)`."""
        loss = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORED)
        if teacher is None or taught is None:
            return loss
        loss, t = loss * teacher.labels, teacher.temperature
        with torch.no_grad():
            follow = F.log_softmax(self.backbone.head(taught[None])[0].float() / t, -1)
        own = F.log_softmax(logits.float() / t, -1)
        apart = F.kl_div(own, follow, reduction="none", log_target=True).sum(-1)
        return loss + teacher.weight * t * t * apart.masked_fill(targets == IGNORED, 0.0).sum()

    def _inserted(self, out: StepOutput, wanted: Tensor) -> Tensor | float:
        if out.inserted is None:
            return 0.0
        hidden, ends = out.inserted
        absent = ~ends.to(wanted.device) | (wanted == IGNORED)
        targets = torch.full_like(wanted, self.insertion.id)  # type: ignore[arg-type]
        return self._plain(hidden, targets.masked_fill(absent, IGNORED))

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
        size = max(1, _LOGITS_AT_ONCE // (4 * self.backbone.config.vocab_size * len(wanted)))
        pieces = list(zip(*[x.split(size, 1) for x in (hidden, key, wanted, taught)], strict=True))
        if not len(tokens):
            return hidden.float().sum()
        if len(pieces) > 1 and torch.is_grad_enabled():
            return sum(recomputed(part, *piece) for piece in pieces)
        return sum(part(*piece) for piece in pieces)  # type: ignore[return-value]

    def _plain(self, hidden: Tensor, wanted: Tensor, teacher: Teacher | None = None) -> Tensor:
        chosen = wanted != IGNORED
        taught = None if teacher is None else teacher.hidden.to(hidden)[chosen]
        hidden, wanted = hidden[chosen], wanted[chosen]
        head = self.backbone.head

        def part(h: Tensor, t: Tensor, follow: Tensor | None) -> Tensor:
            return self._of_tokens(head(h[None])[0], t, follow, teacher)

        size = max(1, _LOGITS_AT_ONCE // self.backbone.config.vocab_size)
        if hidden.shape[0] <= size:
            # Without targets the sum is a zero that still belongs to the graph.
            return part(hidden, wanted, taught) if len(wanted) else hidden.float().sum()
        follows = repeat(None) if taught is None else taught.split(size)
        parts = list(zip(hidden.split(size), wanted.split(size), follows, strict=False))
        if torch.is_grad_enabled():
            return sum(recomputed(part, *args) for args in parts)
        return sum(part(*args) for args in parts)  # type: ignore[return-value]


def shift_targets(labels: Tensor, real: Tensor) -> Tensor:
    """Make targets `(B, T)` of `labels` `(B, T)`: each real column predicts the next one's
    label."""
    real = real.to(labels.device)
    labels = labels.masked_fill(~real, IGNORED)
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets.masked_fill(~real, IGNORED)
