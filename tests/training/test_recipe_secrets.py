"""What a run writes of its recipe: no secret of the machine or of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from memwrap.stores.urls import without_secrets
from memwrap.training.recipe import load_recipe

SECRET = "hunter2"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("output: runs/x\nmemory: {name: knnlm, segment_size: 8}\n")
    return path


@pytest.mark.parametrize(
    "word",
    [
        f"memory.store=postgresql://me:{SECRET}@127.0.0.1/x",
        f"memory.store='postgresql://me:{SECRET}@127.0.0.1/x?table=y'",
        f"memory.store=postgresql://me@127.0.0.1/x?password={SECRET}&table=y",
        f"memory={{name: knnlm, store: 'postgresql://me:{SECRET}@127.0.0.1/x'}}",
        f"data.options.token={SECRET}",
        f"data.options={{token: {SECRET}}}",
        f"data.options={{storage_options: {{secret: {SECRET}}}}}",
        "data.options.token=${oc.env:PRIVATE_TOKEN}",
    ],
)
def test_passwords_and_tokens_are_not_written(
    recipe: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVATE_TOKEN", SECRET)
    loaded = load_recipe(recipe, [word])
    in_memory = str(loaded.memory) + str(loaded.data and loaded.data.options)
    assert SECRET in in_memory  # it is used
    assert SECRET not in loaded.to_yaml()
    assert SECRET not in " ".join(loaded.command)
    assert yaml.safe_load(loaded.to_yaml())["memory"]["name"] == "knnlm"


def test_other_words_of_a_command_stay() -> None:
    place = "postgresql://me@127.0.0.1/x?table=y"
    for word in ("memory.num_memory_tokens=8", "data.source=datasets:a/b:train", "output=runs/x",
                 f"memory.store={place}", "data.max_tokens=64"):  # fmt: skip
        assert without_secrets(word) == word
