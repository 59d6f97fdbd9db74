"""Every memory with the settings it has when none are given, which `tiny()` replaces elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import refused

import memwrap
from memwrap.io.checksums import checksums
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_same_states, ids, randomise


@pytest.mark.parametrize("memory", memwrap.available())
def test_model_and_states_are_saved_and_loaded(memory: str, tmp_path: Path) -> None:
    """What was read before and after saving continues bit for bit."""
    model = randomise(memwrap.wrap(build("llama"), memory)).eval()
    assert model.memory_configs == [memwrap.config_class(memory)()]
    model.save_pretrained(tmp_path, include_base=True)
    again = memwrap.load(tmp_path)
    assert again.memory_configs == model.memory_configs
    text, more = ids(1, model.segment_size + 40), ids(1, 6, seed=1)
    read = model.read(text)
    states = {"empty": model.new_state(1), "open": read, "closed": model.close_segment(read)}
    for name, state in states.items():
        path = tmp_path / f"{name}.safetensors"
        state.save(path)
        want = model(more, cache=state.clone()).logits
        for loaded in (memwrap.MemoryState.load(path), memwrap.MemoryState.load(path, again)):
            assert_same_states(loaded, state, tolerance=0.0)
            assert loaded.memories.keys() == state.memories.keys()
            assert torch.equal(again(more, cache=loaded).logits, want), name


def test_a_state_that_lost_its_tensors_is_refused(tmp_path: Path) -> None:
    """A memory may keep nothing, but not lose what it kept."""
    model = memwrap.wrap(build("llama"), "rmt").eval()
    whole, torn = tmp_path / "whole.safetensors", tmp_path / "torn.safetensors"
    model.read(ids(1, 40)).save(whole)
    with safe_open(whole, framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        kept = {n: file.get_tensor(n) for n in names if not n.startswith("memories.")}
    assert len(kept) < len(names)
    save_file(kept, torn, metadata=metadata)
    with refused("damaged"):
        memwrap.MemoryState.load(torn)
    # Even with checksums made anew, and without a model that knows what its memories keep.
    save_file(kept, torn, metadata=metadata | checksums(kept, about=metadata["about"]))
    with refused("damaged", "rmt"):
        memwrap.MemoryState.load(torn)
