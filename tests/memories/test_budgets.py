"""Settings and states: a field is in the signature, or a state stays valid when it changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import typed_values
from support import MEMORIES

import memwrap
from memwrap.memories.config import MemoryConfig
from memwrap.memories.settings import PositiveInt
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, assert_same_states, error_of, ids, tiny, wrapped


def others(config: MemoryConfig, name: str) -> list[MemoryConfig]:
    """The config with other values of a field, as far as they go with the rest."""
    found = []
    for value in typed_values.inside(type(config).types()[name]):
        if value == getattr(config, name):
            continue
        try:
            found.append(dataclasses.replace(config, **{name: value}))
        except ValueError:
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_field_is_refused_or_gives_a_valid_state(memory: str, tmp_path: Path) -> None:
    """Refused because the signature differs; valid: read on, joined, saved, loaded, closed."""
    model, text = wrapped(memory), ids(1, 21)
    config = dataclasses.replace(model.memory_configs[0])
    state = model.read(text)
    free = config.free_fields()
    for name in type(config).types():
        changes = others(config, name)
        for other in changes if name not in free else ():
            assert other.signature() != config.signature(), name
        if name not in free or name == "store":  # a store is a folder, opened when it is named
            assert name in free or name in config.signature()
            continue
        assert name not in config.signature()
        for other in changes:
            before = model.memory_settings(memory, **{name: getattr(other, name)})
            assert list(before) == [name]
            assert model.memory_configs[0].to_dict() == other.to_dict()
            assert model.config.memories == [other.to_dict()]
            read = model.read(ids(1, 14, seed=2), state=state)
            both = memwrap.MemoryState.cat([read, state, model.read(text[:, :3])])
            again = model.close_segment(model.read(ids(3, 9, seed=3), state=both))
            again.save(tmp_path / "state.safetensors")
            loaded = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
            assert_same_states(loaded, again, 0)
            model.memory_settings(memory, **before)
    assert_same_states(model.read(text), state, 0)  # all is as it was


def test_a_state_is_asked_with_another_budget() -> None:
    """Read with `top_k` 1, asked with 8 and with 1 again."""
    few = memwrap.wrap(build("llama"), tiny("infllm", top_k=1)).eval()
    text, question = ids(2, 40), ids(2, 6, seed=1)
    state = few.read(text)
    with torch.no_grad():
        narrow = few(question, cache=state.clone()).logits
        assert few.memory_settings("infllm", top_k=8) == {"top_k": 1}
        wide = few(question, cache=state.clone()).logits
        assert error_of(wide, narrow) > 1e-3
        few.memory_settings("infllm", top_k=1)
        assert_close(few(question, cache=state.clone()).logits, narrow, 0)


def test_what_a_state_depends_on_does_not_change() -> None:
    model = wrapped("infllm")
    with pytest.raises(ValueError, match=r"depend on InfLLMConfig.block_size.*What may change: "):
        model.memory_settings("infllm", block_size=4)
    with pytest.raises(ValueError, match=r"InfLLMConfig.top_k is 0; it must be"):
        model.memory_settings("infllm", top_k=0)
    with pytest.raises(ValueError, match="no memory 'rmt' here; there are infllm"):
        model.memory_settings("rmt", num_memory_tokens=2)
    with pytest.raises(ValueError, match="did you mean `top_k`"):
        model.memory_settings("infllm", topk=2)


def test_another_memory_says_it_in_the_same_way() -> None:
    class Mine(MemoryConfig):
        name: ClassVar[str] = "mine"
        not_in_state: ClassVar[frozenset[str]] = frozenset({"breadth"})
        breadth: PositiveInt = 3
        depth: PositiveInt = 3

    assert {"breadth", "loss_on"} <= Mine.free_fields()
    assert Mine(breadth=4).signature() == Mine().signature() != Mine(depth=4).signature()
    members: dict[str, Any] = {"not_in_state": frozenset({"nothing"}), "name": "wrong"}
    with pytest.raises(TypeError, match="not_in_state names 'nothing', which is no field"):
        type("Wrong", (MemoryConfig,), members)
