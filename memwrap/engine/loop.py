"""One call of a memwrap model: checked inputs, the loop over its steps, loss, controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import Backbone
from memwrap.engine.inputs import Inputs
from memwrap.engine.loss import IGNORED, Collect, Head, StepRequest, Teacher
from memwrap.engine.plan import Step, plan, plan_columns
from memwrap.engine.recomputation import recomputed
from memwrap.engine.step import SegmentReader, StepOutput
from memwrap.memories.config import MemoryConfig
from memwrap.state.memory_state import BACKBONE, MemoryState
from memwrap.state.open_segment import OpenSegment
from memwrap.state.trees import Tree, tree_map


@dataclass
class Reading:
    """The result of a call: hidden states of the columns asked for, the loss sum, the new state."""

    hidden: Tensor | None
    loss_sum: Any
    targets: int
    state: MemoryState


class Loop:
    """The loop over the steps of one call.

    Args:
        reader: the backbone and its memories.
        config: the config that decides segments, truncation and the loss.
        checkpointing: recompute each segment in the backward pass.
        training: the memory may draw segment lengths. A second reading of the same inputs (for
            logits beside a loss) is cut as the first.
    """

    def __init__(
        self,
        reader: SegmentReader,
        config: MemoryConfig,
        checkpointing: bool,
        training: bool = False,
    ) -> None:
        self.reader = reader
        self.head = Head(reader)
        self.config = config
        self.checkpointing = checkpointing
        self.training = training
        self._planned: tuple[Inputs, list[Step]] | None = None

    def __call__(
        self,
        inputs: Inputs,
        state: MemoryState,
        *,
        targets: Tensor | None = None,
        teacher: Teacher | None = None,
        hidden_from: int | None = None,
        collect: Collect = Collect.HIDDEN,
        keep_open: bool = True,
        control: str | MemoryState | None = None,
        progress: Callable[[Iterable[Step]], Iterable[Step]] = iter,
    ) -> Reading:
        """Read the inputs.

        Args:
            inputs: checked inputs of B rows and T columns.
            state: what the rows remember; it is left as it is.
            targets: `(B, T)` the id that each column predicts, -100 for none.
            teacher: whose distribution is followed beside the targets.
            hidden_from: first column whose last hidden state is wanted; None for none.
            collect: what is wanted of these columns.
            keep_open: keep the open segments' keys and values.
            control: "off" (without `keep_open` nothing is written, either), "shuffled" or a state
                whose memories are read instead.
            progress: wraps the steps, for a progress bar.
        """
        steps = self._steps(inputs, state)
        self._check_positions(steps)
        if targets is not None and self.config.loss_on == "last":
            targets = _only_last(targets, steps)
        states = state.memories
        segment = state.open
        pieces: list[tuple[Tensor, Tensor]] = []
        loss_sum: Tensor | None = None
        new, inserted = state.clone(), 0
        apart: dict[str, Tree] = {}
        for index, step in enumerate(progress(steps)):
            if index and torch.is_grad_enabled() and self.config.detach_before(index):
                states = {name: tree_map(Tensor.detach, tree) for name, tree in states.items()}
                segment = segment.detach()
            keep = keep_open and bool(((step.ends > 0) & ~step.closes).any())
            wanted = None if targets is None else _gather(targets, step, IGNORED)
            taught = None if teacher is None else teacher.at(step)
            request = StepRequest(wanted, collect, hidden_from, control != "off", taught)
            before = states
            if control != "off" or keep_open:  # an empty memory needs no state to go on with
                result, states, segment = self._step(inputs, step, states, segment, keep, request)
            if control is not None:
                result, apart = self._controlled(inputs, step, before | apart, control, request)
            if wanted is not None:
                inserted += self.reader.layout.insertion.count(step, wanted != IGNORED)
                loss_sum = result if loss_sum is None else loss_sum + result
            elif hidden_from is not None:
                pieces += _wanted_pieces(result, request.columns(step), hidden_from)
            new.segments = new.segments + step.closes.long()
            new.fill = step.ends.masked_fill(step.closes, 0)
        self._finish(new, inputs, states if keep_open else states | apart, segment)
        if targets is not None and loss_sum is None:  # nothing but padding
            loss_sum = torch.zeros((), device=inputs.device)
        hidden = None
        if hidden_from is not None:
            hidden = assemble(pieces, inputs, hidden_from, self.reader.backbone, collect)
        count = 0 if targets is None else int((targets != IGNORED).sum()) + inserted
        return Reading(hidden, loss_sum, count, new)

    def close(self, state: MemoryState) -> MemoryState:
        """Close the rows' open segments: the suffix alone runs against their keys and values."""
        closes = state.fill > 0
        if not bool(closes.any()):
            return state.clone()
        nothing = torch.zeros(state.batch_size, 0, dtype=torch.long)
        step = Step(nothing, nothing, state.fill, torch.zeros_like(closes), closes, closes)
        device = self.reader.backbone.device
        embeds = self.reader.backbone.embed(nothing.to(device))
        new = state.clone()
        ids = nothing.to(device) if "ids" in self.reader.looks_at else None
        out = self.reader.run(embeds, step, state.memories, state.open, True, ids)
        new.memories, new.open = out.states, out.segment
        new.segments = state.segments + closes.long()
        new.fill = torch.zeros_like(state.fill)
        return new

    def _steps(self, inputs: Inputs, state: MemoryState) -> list[Step]:
        if not self.config.count_padding:
            if self._planned is None or self._planned[0] is not inputs:
                starts, lengths, config = inputs.starts, inputs.lengths, self.config
                drawing = self.training and torch.is_grad_enabled()  # reading never draws
                steps = plan(starts, lengths, state.fill, config, state.hold_open, drawing)
                self._planned = inputs, steps
            return self._planned[1]
        if bool(state.fill.any()):
            raise ValueError(
                "`count_padding` cuts whole documents by columns; it cannot continue an open "
                "segment. Close it (model.close_segment) or turn `count_padding` off."
            )
        return plan_columns(inputs.real, self.config, state.hold_open)

    def _check_positions(self, steps: list[Step]) -> None:
        """Refuse an open segment that has grown beyond the backbone's position table."""
        limit, extra = self.reader.backbone.max_positions, self.reader.layout.prefix_positions
        longest = max((int(step.ends.max()) for step in steps), default=0)
        if limit is not None and longest + extra > limit:
            raise ValueError(
                f"The open segment has grown to {longest} tokens; the backbone's table has {limit} "
                f"positions ({extra} for memory). With remember=False generate fewer tokens."
            )

    def _step(
        self,
        inputs: Inputs,
        step: Step,
        states: dict[str, Tree],
        segment: OpenSegment,
        keep: bool,
        request: StepRequest,
    ) -> tuple[Tensor, dict[str, Tree], OpenSegment]:
        """Run one step: give its loss sum (with targets) or what is collected, and what follows."""

        def function(
            states: dict[str, Tree], tree: Tree
        ) -> tuple[Tensor, dict[str, Tree], OpenSegment]:
            embeds = self._embeds(inputs, step)
            before = replace(segment, tree=tree)
            out = self.reader.run(embeds, step, states, before, keep, self._ids(inputs, step))
            return self._result(out, step, states, request), out.states, out.segment

        if self.checkpointing and torch.is_grad_enabled():
            return recomputed(function, states, segment.tree)
        return function(states, segment.tree)

    def _result(
        self, out: StepOutput, step: Step, states: dict[str, Tree], request: StepRequest
    ) -> Tensor:
        """Compute what is asked of a step; `states` are those before it."""
        if request.targets is not None:
            return self._loss(out, request, states)
        if request.collect is Collect.KEYS and out.key is not None:
            return out.key
        if request.collect is Collect.LOGITS:
            tokens = request.tokens(step)
            return self.head.logits(out, tokens, states, mixing=request.mixing)
        return out.hidden

    def _controlled(
        self,
        inputs: Inputs,
        step: Step,
        states: dict[str, Tree],
        control: str | MemoryState,
        request: StepRequest,
    ) -> tuple[Tensor, dict[str, Tree]]:
        """Run the step once more, reading other memories; "off" also gives what the backbone
        remembers."""
        rows = step.columns.shape[0]
        if isinstance(control, MemoryState):
            read = control.memories
        elif control == "shuffled":
            read = {n: tree_map(lambda t: t.roll(-1, 0), tree) for n, tree in states.items()}
        else:
            read = self.reader.init_states(rows, inputs.device)
        own = {BACKBONE: states[BACKBONE]} if BACKBONE in states else {}
        nothing = OpenSegment.empty(rows)
        result, after, _ = self._step(inputs, step, read | own, nothing, False, request)
        return result, {n: after[n] for n in own if control == "off"}

    def _embeds(self, inputs: Inputs, step: Step) -> Tensor:
        source = inputs.ids if inputs.ids is not None else inputs.embeds
        if step.uniform:
            first = int(step.columns[0, 0])
            piece = source[:, first : first + step.columns.shape[1]]  # type: ignore[index]
        else:
            index = step.columns.clamp_min(0).to(source.device)  # type: ignore[union-attr]
            rows = torch.arange(index.shape[0], device=index.device)[:, None]
            piece = source[rows, index]  # type: ignore[index]
        return self.reader.backbone.embed(piece) if inputs.ids is not None else piece

    def _ids(self, inputs: Inputs, step: Step) -> Tensor | None:
        """Return the ids `(B, N)` of the step's tokens, -1 where there is none; None if no memory
        looks at them.

        Raises:
            ValueError: if embeddings were given instead.
        """
        if "ids" not in self.reader.looks_at:
            return None
        if inputs.ids is None:
            names = [n for n, m in self.reader.seeing.items() if "ids" in m.looks_at]
            raise ValueError(
                f"The memory {names[0]!r} keeps the ids of what is read; give `input_ids` instead "
                "of `inputs_embeds`."
            )
        return _gather(inputs.ids, step, -1)

    def _loss(self, out: StepOutput, request: StepRequest, states: dict[str, Tree]) -> Tensor:
        """Sum the cross entropy, and the memories' own losses once for each target."""
        targets: Tensor = request.targets  # type: ignore[assignment]
        loss = self.head.loss(out, request, states)
        if out.auxiliary is None:
            return loss
        count = (targets != IGNORED).sum(1).to(out.auxiliary)
        return loss + (out.auxiliary * count).sum()

    @staticmethod
    def _finish(
        new: MemoryState, inputs: Inputs, states: dict[str, Tree], segment: OpenSegment
    ) -> None:
        new.memories, new.open = states, segment
        new.tokens_seen = new.tokens_seen + torch.tensor(inputs.lengths)
        new.ids_hash = new.extend_hash(inputs.ids, inputs.shape[1])
        new.mask_hash = new.mask_hash + new.mask_hash_of(inputs.real, new.columns)
        new.columns += inputs.shape[1]


def _gather(values: Tensor, step: Step, empty: int) -> Tensor:
    """Gather `values` `(B, T)` at the step's columns, `empty` where a row reads nothing."""
    columns = step.columns.to(values.device)
    return values.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, empty)


def _only_last(targets: Tensor, steps: list[Step]) -> Tensor:
    """Keep the targets of each row's last segment."""
    keep = torch.zeros(targets.shape, dtype=torch.bool)
    for step in steps:
        rows, places = ((step.columns >= 0) & step.last[:, None]).nonzero(as_tuple=True)
        keep[rows, step.columns[rows, places]] = True
    return targets.masked_fill(~keep.to(targets.device), IGNORED)


def _wanted_pieces(hidden: Tensor, columns: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """Pick the hidden states from column `first` on, of `hidden` `(B, N, D)` at `columns` `(B, N)`:
    pairs of `(n, D)` and their (row, column) index `(n, 2)`."""
    wanted = columns >= first
    if not bool(wanted.any()):
        return []
    rows, places = wanted.nonzero(as_tuple=True)
    index = torch.stack([rows, columns[rows, places]], 1)
    return [(hidden[rows.to(hidden.device), places.to(hidden.device)], index)]


def assemble(
    pieces: list[tuple[Tensor, Tensor]],
    inputs: Inputs,
    first: int,
    backbone: Backbone,
    collect: Collect,
) -> Tensor:
    """Put the pieces in their columns, `(B, T - first, D)`, with zeros at padding."""
    batch, total = inputs.shape
    width = total - first
    if not pieces:
        size = backbone.config.vocab_size if collect is Collect.LOGITS else backbone.embedding_size
        dtype = next(backbone.model.parameters()).dtype
        return torch.zeros(batch, width, size, dtype=dtype, device=inputs.device)
    values = torch.cat([hidden for hidden, _ in pieces])
    index = torch.cat([place for _, place in pieces]).to(values.device)
    flat = index[:, 0] * width + index[:, 1] - first
    empty = values.new_zeros(batch * width, values.shape[-1])
    return empty.index_copy(0, flat, values).view(batch, width, -1)
