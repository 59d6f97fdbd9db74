"""One call of a memwrap model: checked inputs, the loop over its steps, loss, controls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memwrap.engine.answering import answers_in, with_answers
from memwrap.engine.early_gradients import EarlyGradients
from memwrap.engine.inputs import Inputs
from memwrap.engine.loss import IGNORED, Collect, Head
from memwrap.engine.packed_documents import alike
from memwrap.engine.plan import Step, plan
from memwrap.engine.recomputation import recomputed
from memwrap.engine.step import SegmentReader, StepOutput
from memwrap.memories.config import MemoryConfig
from memwrap.state.memory_state import BACKBONE, MemoryState
from memwrap.state.open_segment import OpenSegment
from memwrap.state.trees import Tree, tree_leaves, tree_map


@dataclass
class Reading:
    """The result of a call: hidden states of the columns asked for, the loss sum, the new state."""

    hidden: Tensor | None
    loss_sum: Any
    targets: int
    state: MemoryState


Trees = dict[str, Tree]
# Makes what is asked of a step, of its output, the step and the trees before it; None: nothing.
Ask = Callable[[StepOutput, Step, Trees], Any] | None


@dataclass
class Loop:
    """The loop over the steps of one call.

    Args:
        reader: the backbone and its memories.
        config: the config that decides segments, truncation and the loss.
        checkpointing: recompute each segment in the backward pass.
        training: the memory may draw segment lengths. A second reading of the same inputs (for
            logits beside a loss) is cut as the first.
    """

    reader: SegmentReader
    config: MemoryConfig
    checkpointing: bool = False
    training: bool = False
    _planned: tuple[Inputs, list[tuple[Inputs, list[Step]]]] | None = None

    def __call__(
        self,
        inputs: Inputs,
        state: MemoryState,
        *,
        hidden_from: int | None = None,
        collect: Collect = Collect.HIDDEN,
        keep_open: bool = True,
        control: str | MemoryState | None = None,
        progress: Callable[[Iterable[Step]], Iterable[Step]] = iter,
    ) -> Reading:
        """Read the inputs, and give the loss of their targets or what is collected.

        Args:
            inputs: checked inputs of T columns. Packed documents are read in groups, each with a
                fresh state.
            state: what the rows remember; it is left as it is. Packed documents leave nothing to
                continue: it comes back.
            hidden_from: first column whose last hidden state is wanted, instead of the loss; None
                for none.
            collect: what is wanted of these columns.
            keep_open: keep the open segments' keys and values.
            control: "off" (without `keep_open` nothing is written, either), "shuffled" or a state
                whose memories are read instead.
            progress: wraps the steps, for a progress bar.

        Raises:
            ValueError: where packed documents were to leave a state or to read another memory.
        """
        groups, packed = self._plan(inputs, state), inputs.rows is not None
        if packed and (keep_open or control is not None):
            raise ValueError(
                "Documents packed in one row begin anew and leave no state: they do not go with "
                "`cache`, `use_cache=True` or `memory_control`. Give each a row."
            )
        targets = inputs.targets if hidden_from is None else None
        if targets is not None and self.config.loss_on == "last":
            targets = _only_last(targets, [step for _, steps in groups for step in steps])
        head = Head(self.reader, mixing=control != "off")
        ask: Ask = None
        if targets is not None:
            ask = partial(head.loss, targets, inputs.teacher)
        elif hidden_from is not None:
            ask = partial(head.collect, hidden_from, collect)
        results: list[Any] = []
        early: EarlyGradients | None = None
        if targets is not None and self.training and torch.is_grad_enabled():
            early = EarlyGradients(inputs.embeds)
        for texts, steps in groups:
            before = self._fresh(texts, state) if packed else state
            if self.reader.tells_answers and texts.targets is not None:
                before = with_answers(before, texts)
            made, after = self._read(texts, progress(steps), before, ask, keep_open, control, early)
            if packed and early is not None and texts is not groups[-1][0]:
                _take_early(early, made, 0)
            results += made
        if not packed:
            after.tokens_seen = after.tokens_seen + inputs.lengths
            after.ids_hash = after.extend_hash(inputs.ids, inputs.shape[1])
            after.mask_hash = after.mask_hash + after.mask_hash_of(inputs.real, after.columns)
            after.columns += inputs.shape[1]
        reading = Reading(None, None, 0, state if packed else after)
        if targets is not None:
            losses = [loss for loss, _ in results] or [torch.zeros((), device=inputs.device)]
            if early is not None and early.loss is not None:
                losses.append(early.loss)
            reading.loss_sum = sum(losses)
            reading.targets = int((targets != IGNORED).sum()) + sum(more for _, more in results)
        elif hidden_from is not None:
            reading.hidden = self._assemble(results, inputs, hidden_from, collect)
        return reading

    def close(self, state: MemoryState) -> MemoryState:
        """Close the rows' open segments: the suffix alone runs against their keys and values."""
        closes = state.fill > 0
        if not bool(closes.any()):
            return state.clone()
        zero, rows = torch.zeros_like(state.fill), torch.arange(state.batch_size)
        nothing = torch.zeros(state.batch_size, 0, dtype=torch.long)
        ids = nothing.to(self.reader.backbone.device)
        inputs = Inputs(ids, None, nothing.bool(), zero, zero)
        step = Step(nothing, nothing, state.fill, zero.bool(), closes, closes, rows)
        return self._read(inputs, [step], state, None, False, None, None)[1]

    def _plan(self, inputs: Inputs, state: MemoryState) -> list[tuple[Inputs, list[Step]]]:
        """Cut the call into steps, for each group of texts that is read together."""
        if self._planned is not None and self._planned[0] is inputs:
            return self._planned[1]
        packed, config = inputs.rows is not None, self.config
        if config.count_padding and packed:
            raise ValueError(
                "`count_padding` cuts rows by columns, padding included, and documents packed in "
                "one row begin anew; turn it off, or give every document a row."
            )
        if config.count_padding and bool(state.fill.any()):
            raise ValueError(
                "`count_padding` cuts whole documents by columns; it cannot continue an open "
                "segment. Close it (model.close_segment) or turn `count_padding` off."
            )
        if inputs.ids is None and self.reader.backbone.ids_matter:
            raise ValueError(
                f"{type(self.reader.backbone.model).__name__} looks at the ids of what it reads; "
                "give `input_ids` instead of `inputs_embeds`."
            )
        if inputs.ids is None and "ids" in self.reader.looks_at:
            names = [n for n, m in self.reader.seeing.items() if "ids" in m.looks_at]
            raise ValueError(
                f"The memory {names[0]!r} keeps the ids of what is read; give `input_ids` instead "
                "of `inputs_embeds`."
            )
        drawing = self.training and torch.is_grad_enabled()  # reading never draws
        groups = []
        for texts in alike(inputs):
            fill = torch.zeros_like(texts.lengths) if packed else state.fill
            groups.append((texts, plan(texts, fill, config, state.hold_open, drawing)))
            self._check_positions(groups[-1][1])
        self._planned = inputs, groups
        return groups

    def _check_positions(self, steps: list[Step]) -> None:
        """Refuse an open segment that has grown beyond the backbone's positions."""
        limit, extra = self.reader.backbone.position_limit, self.reader.layout.prefix_positions
        longest = max((int(step.ends.max()) for step in steps), default=0)
        if limit is not None and longest + extra > limit.positions:
            raise ValueError(
                f"The open segment has grown to {longest} tokens ({extra} more positions are for "
                f"memory), but {limit.reason}. With remember=False generate fewer tokens."
            )

    def _fresh(self, texts: Inputs, like: MemoryState) -> MemoryState:
        """Make the state of texts that begin anew."""
        count, device = len(texts.lengths), self.reader.backbone.device
        state = MemoryState(self.reader.init_states(count, device), count)
        state.hold_open = like.hold_open
        return state

    def _read(
        self,
        inputs: Inputs,
        steps: Iterable[Step],
        state: MemoryState,
        ask: Ask,
        keep_open: bool,
        control: str | MemoryState | None,
        early: EarlyGradients | None,
    ) -> tuple[list[Any], MemoryState]:
        """Run the steps: give what is asked of each, and the state after them. Losses in front of a
        cut go to `early`."""
        states, segment = state.memories, state.open
        results: list[Any] = []
        new = state.clone()
        apart: Trees = {}
        begun = 0 if early is not None and not _in_graph(states, segment) else None
        for index, step in enumerate(steps):
            if index and torch.is_grad_enabled() and self.config.detach_before(index):
                if early is not None and begun is not None:
                    _take_early(early, results, begun)
                begun = index
                states = {name: tree_map(Tensor.detach, tree) for name, tree in states.items()}
                segment = segment.detach()
            keep = keep_open and bool(((step.ends > 0) & ~step.closes).any())
            answers = answers_in(step, inputs, state) if self.reader.tells_answers else None
            run, before = partial(self._step, inputs, ask, step, answers), states
            if control != "off" or keep_open:  # an empty memory needs no state to go on with
                result, states, segment = run(states, segment, keep)
            if control is not None:
                result, apart = self._controlled(run, before | apart, control, len(step.rows))
            results.append(result)
            new.segments = new.segments + step.closes.long()
            new.fill = step.ends.masked_fill(step.closes, 0)
        new.memories, new.open = states if keep_open else states | apart, segment
        return results, new

    def _step(
        self, inputs: Inputs, ask: Ask, step: Step, answers: Tensor | None, states: Trees,
        segment: OpenSegment, keep: bool,
    ) -> tuple[Any, Trees, OpenSegment]:  # fmt: skip
        """Run one step: give what is asked of it, and what follows."""

        def function(states: Trees, tree: Tree) -> tuple[Any, Trees, OpenSegment]:
            if inputs.ids is None:
                embeds = step.take(inputs.embeds)  # type: ignore[arg-type]
            else:
                embeds = self.reader.backbone.embed(step.take(inputs.ids))
            before = replace(segment, tree=tree)
            ids = step.take(inputs.ids, -1) if self.reader.needs_ids else None  # type: ignore[arg-type]
            out = self.reader.run(embeds, step, states, before, keep, ids, answers)
            return ask(out, step, states) if ask else None, out.states, out.segment

        if self.checkpointing and torch.is_grad_enabled():
            return recomputed(function, states, segment.tree)
        return function(states, segment.tree)

    def _controlled(
        self, run: Callable[..., Any], states: Trees, control: str | MemoryState, rows: int
    ) -> tuple[Any, Trees]:
        """Run a step once more, reading other memories; "off" also gives what the backbone
        remembers."""
        if isinstance(control, MemoryState):
            read = control.memories
        elif control == "shuffled":
            read = {n: tree_map(lambda t: t.roll(-1, 0), tree) for n, tree in states.items()}
        else:
            read = self.reader.init_states(rows, self.reader.backbone.device)
        kept = {BACKBONE: states[BACKBONE]} if BACKBONE in states else {}
        result, after, _ = run(read | kept, OpenSegment.empty(rows), False)
        return result, {n: after[n] for n in kept if control == "off"}

    def _assemble(
        self, pieces: list[tuple[Tensor, Tensor]], inputs: Inputs, first: int, collect: Collect
    ) -> Tensor:
        """Put the pieces in their columns, `(B, T - first, D)`, with zeros at padding."""
        (batch, total), backbone = inputs.shape, self.reader.backbone
        width = total - first
        pieces = [piece for piece in pieces if len(piece[1])]
        if not pieces:
            logits, dtype = collect is Collect.LOGITS, next(backbone.model.parameters()).dtype
            size = backbone.config.vocab_size if logits else backbone.embedding_size
            return torch.zeros(batch, width, size, dtype=dtype, device=inputs.device)
        values = torch.cat([made for made, _ in pieces])
        index = torch.cat([place for _, place in pieces]).to(values.device)
        flat = index[:, 0] * width + index[:, 1] - first
        empty = values.new_zeros(batch * width, values.shape[-1])
        return empty.index_copy(0, flat, values).view(batch, width, -1)


def _in_graph(states: Trees, segment: OpenSegment) -> bool:
    """Tell whether a state that is continued has gradients of its own."""
    return any(t.requires_grad for _, t in tree_leaves({**states, "open": segment.tree}))


def _take_early(early: EarlyGradients, results: list[Any], begun: int) -> None:
    """Hand over the losses of the steps from `begun` on; zeros take their places."""
    part = results[begun:]
    if early.take(sum(loss for loss, _ in part)):
        results[begun:] = [(torch.zeros_like(loss), more) for loss, more in part]


def _only_last(targets: Tensor, steps: list[Step]) -> Tensor:
    """Keep the targets of each text's last segment."""
    keep = torch.zeros(targets.shape, dtype=torch.bool)
    for step in steps:
        read = (step.columns >= 0) & step.last[:, None]
        keep[step.rows[:, None].expand_as(read)[read], step.columns[read]] = True
    return targets.masked_fill(~keep.to(targets.device), IGNORED)
