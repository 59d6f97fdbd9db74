"""The adapters that memwrap ships."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

import memwrap
from memwrap.assets import FETCHED, ROOT, asset
from memwrap.model.configuration import MemoryModelConfig
from memwrap.training.recipe import load_recipe

ADAPTERS = ("armt-lm", "armt-recall", "armt-facts")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_whole(name: str) -> None:
    folder = ROOT / name
    config = MemoryModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    (values,) = config.memories or []
    memory = memwrap.config_class(values["name"]).from_dict(values)
    base = config.base_model
    assert base in FETCHED or asset(base) is not None
    recipe = load_recipe(folder / "recipe.yaml")
    # A text of the recipe decides how many tokens there are; what no state depends on may be chosen
    # after training.
    free = {"num_memory_tokens", *type(memory).free_fields()}
    trained = recipe.memory_config().to_dict() | {name: memory.to_dict()[name] for name in free}
    assert memory.to_dict() == trained
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    assert tensors and all(bool(t.isfinite().all()) for t in tensors)


def test_the_adapter_for_facts_is_small() -> None:
    folder = ROOT / "armt-facts"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
