"""Which tokens are part of an answer, for memories that read these another way.

A state says from which of a row's tokens on (`MemoryState.answer_from`), so that nothing depends on
how a text is fed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.engine.inputs import IGNORED, Inputs
from memwrap.engine.plan import Step
from memwrap.state.memory_state import NEVER, MemoryState


def first_labels(targets: Tensor, starts: Tensor) -> Tensor:
    """Find the first token of each text that is predicted, counted from the text's first.

    Args:
        targets: `(N, T)` the id that each column of a text's row predicts; -100 outside of it.
        starts: `(N,)` its first column.

    Returns:
        `(N,)`; `NEVER` where none is, or where nothing stands in front that could be answered.
    """
    chosen = targets.cpu() != IGNORED
    first = chosen.int().argmax(1) - starts
    return torch.where(chosen.any(1) & (first > 0), first + 1, NEVER)


def with_answers(state: MemoryState, inputs: Inputs) -> MemoryState:
    """Let answers begin at the first label of every row where nothing was said yet."""
    known, targets = state.answers, inputs.targets.cpu()  # type: ignore[union-attr]
    if inputs.rows is not None:  # documents packed in one row
        column, starts = torch.arange(inputs.shape[1]), inputs.starts[:, None]
        outside = (column < starts) | (column >= starts + inputs.lengths[:, None])
        targets = targets[inputs.rows].masked_fill(outside, IGNORED)
    first, new = first_labels(targets, inputs.starts), state.clone()
    number = torch.where(first == NEVER, NEVER, state.tokens_seen + first)
    new.answer_from = torch.where(known == NEVER, number, known)
    return new


def marked(state: MemoryState, first: Tensor | list[int] | None) -> MemoryState:
    """Say from which of the rows' tokens on `(B,)` an answer is read; None: as the state has it.

    Raises:
        ValueError: for another number of rows, or numbers that are no whole ones from 0.
    """
    if first is None:
        return state
    given = torch.as_tensor(first).cpu()
    whole = not given.is_floating_point() and given.dtype != torch.bool
    if not whole or tuple(given.shape) != (state.batch_size,) or int(given.min()) < 0:
        raise ValueError(
            f"`answer_from` is {given.tolist()}; it needs a whole number of at least 0 for each of "
            f"the {state.batch_size} rows: the first token that is part of the answer."
        )
    new = state.clone()
    new.answer_from = given.long()
    return new


def unmarked(state: MemoryState) -> MemoryState:
    """Take back what was said of answers: what is read next is none."""
    if state.answer_from is None:
        return state
    new = state.clone()
    new.answer_from = None
    return new


def answers_in(step: Step, inputs: Inputs, state: MemoryState) -> Tensor | None:
    """Tell which of a step's tokens are part of an answer, `(B, N)` bool; None: none.

    Args:
        step: of the call.
        inputs: the call's texts.
        state: before the call.
    """
    if state.answer_from is None:
        return None
    number = state.tokens_seen[:, None] + step.columns - inputs.starts[:, None]
    answers = (step.columns >= 0) & (number >= state.answer_from[:, None])
    return answers if bool(answers.any()) else None
