"""Invariant 2: a row padded inside a batch gives what it gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    TOLERANCE,
    assert_close,
    assert_memory_matters,
    assert_same_gradients,
    assert_same_states,
    gradients,
    ids,
    padded,
    pairs,
    wrapped,
)

SIDES = ("left", "right")
LENGTHS = (3 * SEGMENT + 3, 2 * SEGMENT, SEGMENT + 1, 1)
ROWS = [ids(1, n, seed=n)[0] for n in LENGTHS]
# Another family than llama has no other arithmetic of places: what is remembered, a segment that is
# just full, and a row that is nearly nothing but padding.
FEW = [ids(1, n, seed=n)[0] for n in (2 * SEGMENT + 3, SEGMENT, 1)]


def summed(model: Any, text: Tensor, mask: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """What a call of training gives, with the sum of all losses, and its gradients."""
    labels = text.masked_fill(mask == 0, -100)
    asked = {"labels": labels, "num_items_in_batch": 1, "return_logits": True, "use_cache": True}
    out = model.train()(text, attention_mask=mask, **asked)
    if bool((labels[:, 1:] != -100).any()):
        out.loss.backward()
    return out, gradients(model)


def assert_rows(out: Any, mask: Tensor, alone: list[Any], label: str) -> None:
    """Logits and states of a padded batch are those of each row alone."""
    for index, single in enumerate(alone):
        got = out.logits[index][mask[index].bool()]
        assert_close(got, single.logits[0], label=f"row {index} padded {label}")
        assert_same_states(out.cache.select(torch.tensor([index])), single.cache)


def check_padded_rows(
    model: Any, tolerance: float, rows: list[Tensor] = ROWS, sides: Sequence[str] = SIDES
) -> None:
    """Logits, states, the loss and its gradients; where nothing is trained, a few rows again."""
    alone: list[Any] = []
    want: dict[str, Tensor] = {}
    total = 0.0
    for row in rows:
        single, grads = summed(model, row[None], torch.ones_like(row[None]))
        alone.append(single)
        total += single.loss.item()
        for name, gradient in grads.items():
            want[name] = want[name] + gradient if name in want else gradient
    for side in sides:
        text, mask = padded(rows, side)
        # What stands at padding is nobody's business.
        text = text.masked_fill(mask == 0, 77)
        out, grads = summed(model, text, mask)
        assert_rows(out, mask, alone, side)
        assert out.loss.item() == pytest.approx(total, rel=1e-5)
        assert_same_gradients(grads, want, tolerance)
    if rows is not ROWS:
        return
    model.eval()
    text, mask = padded(FEW, "both")
    with torch.no_grad():
        alone = [model(row[None]) for row in FEW]
        out = model(text.masked_fill(mask == 0, 77), attention_mask=mask)
        assert_rows(out, mask, alone, "on both sides")


@pairs("branches")
def test_padded_rows(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    assert_memory_matters(model, ids(1, 2 * SEGMENT))
    # Ten times the default: a gradient passes many more sums in another order than a logit,
    # and ARMT divides by one of them.
    rows, sides = (ROWS, SIDES) if family == "llama" else (FEW, ("both",))
    check_padded_rows(model, 10 * TOLERANCE, rows, sides)


@pairs("branches", families=("gpt_neox", "gpt2", "opt"))
def test_padded_rows_in_float64(memory: str, family: str) -> None:
    """Where noise cannot hide a mistake (these families' norms do not round to float32)."""
    check_padded_rows(wrapped(memory, base=build(family).double()), 1e-5)


@pytest.mark.long
@pairs()
def test_a_loss_is_the_mean_over_rows_without_padding(memory: str, family: str) -> None:
    """Whether padding has labels or none."""
    model = wrapped(memory, family)
    rows, number = ROWS[:2], {"num_items_in_batch": 1}
    with torch.no_grad():
        total = sum(model(r[None], labels=r[None], **number).loss.item() for r in rows)
        for side in (*SIDES, "both"):
            text, mask = padded(rows, side)
            ignored = text.masked_fill(mask == 0, -100)
            want = model(text, attention_mask=mask, labels=ignored).loss
            got = model(text, attention_mask=mask, labels=text).loss
            assert want.item() == pytest.approx(total / sum(len(r) - 1 for r in rows), rel=1e-5)
            assert got.item() == pytest.approx(want.item(), rel=1e-6), side


@pairs()
def test_a_padded_batch_fed_in_pieces(memory: str, family: str) -> None:
    """Rows are at different places of their segments, some pieces hold no token of a row."""
    model = wrapped(memory, family)
    for side in ("left", "right"):
        text, mask = padded(ROWS, side)
        state = model.new_state(len(ROWS))
        pieces = []
        with torch.no_grad():
            for piece, part in zip(text.split(5, 1), mask.split(5, 1), strict=True):
                out = model(piece, attention_mask=part, cache=state)
                pieces.append(out.logits)
            logits = torch.cat(pieces, 1)
            for index, row in enumerate(ROWS):
                single = model(row[None])
                assert_close(logits[index][mask[index].bool()], single.logits[0], label=side)
                one = state.select(torch.tensor([index]))
                assert_same_states(one, single.cache)


@pairs()
def test_closing_segments_of_ragged_rows(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    state = model.close_segment(model.read([r.tolist() for r in ROWS]))
    for index, row in enumerate(ROWS):
        want = model.close_segment(model.read(row))
        assert_same_states(state.select(torch.tensor([index])), want)


@pairs()
def test_states_of_different_readings_in_one_batch(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    text = ids(len(ROWS), SEGMENT + 2, seed=9)
    states = [model.read(row) for row in ROWS]
    joined = type(states[0]).cat(states)
    assert joined.tokens_seen.tolist() == list(LENGTHS)
    with torch.no_grad():
        got = model(text, cache=joined).logits
        for index, state in enumerate(states):
            want = model(text[index : index + 1], cache=state).logits
            assert_close(got[index], want[0])
        repeated = model.read(ROWS[0]).repeat(3)
        rows = model(text[:3], cache=repeated).logits
    assert_close(rows[0], got[0])


def test_an_all_padding_row_and_an_all_padding_batch(memory: str) -> None:
    model = wrapped(memory)
    text, mask = padded([ROWS[0], ROWS[0][:0]], "left")
    with torch.no_grad():
        out = model(text, attention_mask=mask)
        assert_close(out.logits[0], model(ROWS[0][None]).logits[0])
        assert bool(out.logits.isfinite().all())
        assert out.cache.tokens_seen.tolist() == [len(ROWS[0]), 0]
        nothing = model(text, attention_mask=torch.zeros_like(mask))
    assert nothing.logits.shape[:2] == text.shape and bool(nothing.logits.isfinite().all())
    assert nothing.cache.tokens_seen.tolist() == [0, 0]
    assert_same_states(nothing.cache, model.new_state(2), 0.0)


def test_the_loss_of_nothing_is_zero(memory: str) -> None:
    model = wrapped(memory).train()
    text, mask = padded([ROWS[0]], "left")
    for kwargs in (
        {"labels": torch.full_like(text, -100)},
        {"labels": text, "attention_mask": torch.zeros_like(mask)},
    ):
        loss = model(text, **kwargs).loss
        assert loss is not None and loss.item() == 0.0
        if loss.requires_grad:
            loss.backward()
            assert all(bool(g.isfinite().all()) for g in gradients(model).values())
