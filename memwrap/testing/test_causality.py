"""Invariants 3 and 4: causality, isolation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memwrap.memories.protocol import LogitsMemory
from memwrap.model.building import sizes_of
from memwrap.state.trees import tree_leaves
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_memory_matters,
    assert_same_states,
    error_of,
    ids,
    pairs,
    wrapped,
)


@pairs()
def test_a_token_changes_nothing_before_it_and_something_after(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(1, 3 * SEGMENT + 3)
    # Where all layers have windows, what is seen through them is that of the segment before.
    near = getattr(model.memories[memory], "within_window", False) and all(
        size.window is not None for size in sizes_of(model.parts, attention=True).attention.values()
    )
    with torch.no_grad():
        want = model(text).logits
        for place in (0, 5, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 1, text.shape[1] - 1):
            changed = text.clone()
            changed[0, place] = (changed[0, place] + 17) % 100 + 3
            got = model(changed).logits
            assert_close(got[:, :place], want[:, :place], 1e-6, f"before token {place}")
            assert error_of(got[:, place], want[:, place]) > 1e-2
            if place < 2 * SEGMENT:  # what was read is remembered in later segments
                after = (place // SEGMENT + 1) * SEGMENT if near else 2 * SEGMENT
                assert error_of(got[:, after:], want[:, after:]) > 1e-6


@pairs()
def test_interleaved_states_do_not_meet(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    texts = [ids(1, 3 * SEGMENT + 3, seed=s) for s in (1, 2)]
    assert_memory_matters(model, ids(1, 2 * SEGMENT))
    with torch.no_grad():
        want = [model(text) for text in texts]
        states = [model.new_state(1) for _ in texts]
        logits: list[list[torch.Tensor]] = [[], []]
        for piece in range(0, texts[0].shape[1], 5):
            for index in (0, 1):
                part = texts[index][:, piece : piece + 5]
                logits[index].append(model(part, cache=states[index]).logits)
    for index in (0, 1):
        assert_close(torch.cat(logits[index], 1), want[index].logits)
        assert_same_states(states[index], want[index].cache)
    assert error_of(want[0].logits, want[1].logits) > 1e-2


@pairs()
def test_a_second_fresh_call_equals_the_first(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(2, 3 * SEGMENT + 3)
    with torch.no_grad():
        first = model(text).logits
        model.read(ids(3, 20, seed=5))
        model.generate(ids(1, 4), max_new_tokens=3, do_sample=False)
        model(ids(2, 12, seed=6), labels=ids(2, 12, seed=6))
        second = model(text).logits
    assert torch.equal(first, second)


@pairs()
def test_clones_are_independent(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    state = model.read(ids(1, 11))
    kept = {n: t.clone() for name, n_t in state.memories.items() for n, t in tree_leaves(n_t)}
    other = state.clone()
    with torch.no_grad():
        model(ids(1, 9, seed=4), cache=other)
    assert state.tokens_seen.tolist() == [11] and other.tokens_seen.tolist() == [20]
    for _, tree in state.memories.items():
        for name, value in tree_leaves(tree):
            assert torch.equal(value, kept[name])
    with torch.no_grad():
        got = model(ids(1, 9, seed=4), cache=state).cache
    assert_same_states(got, other, 0.0)


@pytest.mark.long
def test_a_cancelled_call_leaves_the_state_whole(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = wrapped(memory), ids(1, 3 * SEGMENT)
    state = model.read(ids(1, 11, seed=2))
    before = state.clone()
    run, calls = model.parts.run, []

    def cancelled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(model.parts, "run", cancelled)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(text, cache=state)
    monkeypatch.undo()
    assert_same_states(state, before, 0.0)
    with torch.no_grad():
        got = model(text, cache=state).logits
        want = model(text, cache=before).logits
    assert torch.equal(got, want)


def test_controls_change_what_is_read_and_not_what_is_kept(memory: str) -> None:
    model = wrapped(memory)
    first, second = ids(2, 2 * SEGMENT, seed=1), ids(2, SEGMENT, seed=2)
    with torch.no_grad():
        state = model.read(first)
        plain = model(second, cache=state.clone())
        # What mixes in what its weights know is out of the mixture then.
        weights_alone = isinstance(model.memories[memory], LogitsMemory) and not (
            model.memories[memory].claims.neutral_start
        )
        fresh = model.backbone if weights_alone else model
        off = model(second, cache=state.clone(), memory_control="off")
        assert_close(off.logits, fresh(second).logits)
        assert_same_states(off.cache, plain.cache, 1e-6)
        swap = model(second, cache=state.clone(), memory_control="shuffled")
        turned = model(second, cache=state.select(torch.tensor([1, 0])))
        assert_close(swap.logits, turned.logits)
        assert_same_states(swap.cache, plain.cache, 1e-6)
        foreign = model.read(ids(2, 2 * SEGMENT, seed=8))
        other = model(second, cache=state.clone(), memory_control=foreign)
        assert_close(other.logits, model(second, cache=foreign.clone()).logits)
        assert_same_states(other.cache, plain.cache, 1e-6)
    for out in (off, swap, other):
        assert error_of(out.logits, plain.logits) > 1e-2
    with torch.no_grad():
        labels = second
        on = model(second, cache=state.clone(), labels=labels).loss
        without = model(second, cache=state.clone(), labels=labels, memory_control="off").loss
        alone = fresh(second, labels=labels).loss
    assert without.item() == pytest.approx(alone.item(), rel=1e-5)
    assert abs(on.item() - alone.item()) > 1e-3
