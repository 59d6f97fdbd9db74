"""Invariant 13: whole numbers in a state say how much of a buffer is filled and what was chosen. A
file with others is refused: every memory declares what they may be (`Memory.ranges`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memwrap
from memwrap.memories.protocol import places_of
from memwrap.memories.registry import memory_class
from memwrap.model.state_files import progress_of
from memwrap.state.trees import RECENT, tree_build, tree_leaves, tree_map
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_states,
    ids,
    padded,
    pairs,
    tiny,
    wrapped,
)


def state_of(model: Any) -> Any:
    """Rows that have read much, some and nothing of a segment's end."""
    rows = [ids(6 * SEGMENT + 5, seed=1), ids(SEGMENT + 3, seed=2), ids(3, seed=3)]
    text, mask = padded(rows, "left")
    with torch.no_grad():
        return model(text, attention_mask=mask).cache


def whole_numbers(tree: Any) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in tree_leaves(tree) if leaf.dtype == torch.long}


@pairs()
def test_whole_numbers_are_declared(memory: str, family: str) -> None:
    model = wrapped(memory, family)
    state = state_of(model)
    tree = state.memories[memory]
    progress = progress_of(model, state)
    declared = {id(t) for t, *_ in model.memories[memory].ranges(tree, progress)}
    missing = [name for name, leaf in whole_numbers(tree).items() if id(leaf) not in declared]
    assert not missing, f"{memory}.ranges says nothing of {missing}"


@pairs()
def test_a_state_with_other_numbers_is_refused(memory: str, family: str, tmp_path: Path) -> None:
    model, path = wrapped(memory, family), tmp_path / "state.safetensors"
    state = state_of(model)
    for honest in (state, model.close_segment(state), state.select(torch.tensor([1])),
                   state.select(torch.tensor([2, 0, 2])), model.new_state(2)):  # fmt: skip
        honest.save(path)
        memwrap.MemoryState.load(path, model)
    for name, leaf in whole_numbers(state.memories[memory]).items():
        for change in (torch.full_like(leaf, -7), leaf + 1000):
            wrong = state.clone()
            wrong.memories = {
                **state.memories,
                memory: tree_map(
                    lambda t, old=leaf, new=change: new if t is old else t, state.memories[memory]
                ),
            }
            wrong.save(path)
            with pytest.raises(ValueError, match=r"damaged") as caught:
                memwrap.MemoryState.load(path, model)
            assert memory in str(caught.value), name


def reshaped(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor with each dimension but the rows shorter or longer, and one more or less."""
    for place in range(1, tensor.dim()):
        size = tensor.shape[place]
        yield f"{place} more", tensor.unsqueeze(place)
        if size:
            yield f"{place} shorter", tensor.narrow(place, 0, size - 1)
            last = tensor.narrow(place, size - 1, 1)
            yield f"{place} longer", torch.cat([tensor, last], place)
            yield f"{place} gone", tensor.select(place, 0)
    yield "other dtype", tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32)


def without_layers(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers", name)


@pytest.mark.long
@pairs()
def test_a_state_of_other_shapes_is_refused_or_reads_alike(memory: str, family: str) -> None:
    """Every tensor of the last layer and beside the layers, in every dimension. Tensors that grow
    may be longer than they need be, as those of a row that was read beside longer ones."""
    model, text = wrapped(memory, family), ids(1, 2 * SEGMENT + 3, seed=4)
    with torch.no_grad():
        state = model.read(ids(1, 6 * SEGMENT + 7, seed=1))
        states = {"memories": state.memories, "open": state.open.tree}
        leaves = dict(tree_leaves(states))
        last = {without_layers(name): name for name in leaves}  # of layers that are alike
        want = model(text, cache=state).logits, model.close_segment(state)
        for name in last.values():
            for change, tensor in reshaped(leaves[name]):
                changed = tree_build(leaves | {name: tensor})
                wrong = state.clone()
                nothing: Any = {n: {} for n in state.memories}  # some keep none
                wrong.memories, wrong.unverified = nothing | changed.get("memories", {}), True
                wrong.open = dataclasses.replace(state.open, tree=changed["open"])
                try:
                    model.check_state(wrong)
                except ValueError as error:
                    assert "damaged" in str(error), (name, change)
                    continue
                assert_close(model(text, cache=wrong).logits, want[0], label=f"{name} {change}")
                assert_close(
                    model(text, cache=model.close_segment(wrong)).logits,
                    model(text, cache=want[1]).logits, label=f"closed, {name} {change}",
                )  # fmt: skip


@pairs()
def test_more_recent_tokens_than_any_reading_keeps_change_nothing(
    memory: str, family: str, tmp_path: Path
) -> None:
    """Or are refused: how many there are is not said by the model's shapes."""
    model, path = wrapped(memory, family), tmp_path / "state.safetensors"
    state, text = state_of(model), ids(3, 5, seed=4)
    leaves = tree_leaves(state.memories[memory])
    recent = {id(leaf) for name, leaf in leaves if f".{RECENT}." in f".{name}"}
    longer = tree_map(
        lambda t: torch.cat([torch.ones_like(t)] * 4 + [t], 2) if id(t) in recent else t,
        state.memories[memory],
    )
    wrong = state.clone()
    wrong.memories = {**state.memories, memory: longer}
    wrong.save(path)
    try:
        again = memwrap.MemoryState.load(path, model)
    except ValueError as error:
        assert recent and "damaged" in str(error)
        return
    with torch.no_grad():
        assert_close(model(text, cache=again).logits, model(text, cache=state).logits)


@pytest.mark.long
@pairs()
def test_states_beside_counted_padding_and_prompts_load(
    memory: str, family: str, tmp_path: Path
) -> None:
    """Where padding fills segments, and where another memory's prompt stands among the tokens."""
    models = [wrapped(memory, family, count_padding=True)]
    if not {"prompt", "inserted"} & set(places_of(memory_class(memory))):
        models.append(memwrap.wrap(build(family), tiny("rmt"), tiny(memory)).eval())
    for model in models:
        state = state_of(model)
        state.save(tmp_path / "state.safetensors")
        again = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
        assert_same_states(again, state, 0.0)
