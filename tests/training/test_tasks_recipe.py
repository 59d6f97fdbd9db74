"""Training on tasks of the evaluation suite."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import memwrap
from memwrap.assets import asset
from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe
from memwrap.training.tasks import TaskDataset


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(asset("tiny-lm"))


def test_batches(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tasks take turns batch by batch, lengths follow the curriculum, seeds repeat."""
    data = TaskDataset(
        ["mqar", "copy"], tokenizer, batch_size=3, min_tokens=40, max_tokens=100,
        curriculum=[(0, 50), (2, 400)],
    )  # fmt: skip
    rows = list(islice(data, 12))
    lengths = [len(row["input_ids"]) for row in rows]
    assert all(len(set(lengths[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert max(lengths[:6]) <= 50
    assert max(lengths) <= 100
    assert (rows[0]["labels"] != -100).sum() <= 8
    assert (rows[3]["labels"] != -100).sum() == lengths[3] // 2
    again = list(islice(data, 12))
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True)
    )
    assert not torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])


def test_a_generated_answer_is_taught_with_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Or a model that has found the number goes on writing digits, which makes another number."""
    data = TaskDataset(["passkey"], tokenizer, batch_size=4, min_tokens=120, max_tokens=120)
    for row in islice(data, 4):
        answer = row["labels"][row["labels"] != -100]
        assert answer[-1] == tokenizer.eos_token_id == row["input_ids"][-1]
        key = tokenizer.decode(answer[:-1]).strip()
        assert key.isdigit()
        assert tokenizer.decode(row["input_ids"]).count(key) >= 3  # twice told, once asked for


@pytest.mark.slow
def test_a_tasks_recipe_trains_and_is_refused_where_it_cannot(tmp_path: Path) -> None:
    text = (
        "task: tasks\nmodel: {name: tiny-lm, dtype: float32}\n"
        "memory: {name: rmt, segment_size: 32, num_memory_tokens: 2}\nlora: {r: 2}\n"
        "tasks: {names: [updates], min_tokens: 40, max_tokens: 70}\n"
        "trainer: {steps: 2, batch_size: 2, precision: fp32}\n"
    )
    path = tmp_path / "own.yaml"
    path.write_text(text)
    folder = run_recipe(load_recipe(path, [f"output={tmp_path / 'run'}"]))
    assert memwrap.load(folder).memory_configs[0].name == "rmt"
    with pytest.raises(ValueError, match=r"`tasks\.names` is"):
        load_recipe(path, ["output=x", "tasks.names=[nothing]"])
    with pytest.raises(ValueError, match=r"`tasks\.min_tokens` 10: updates needs at least 19"):
        run_recipe(load_recipe(path, [f"output={tmp_path / 'other'}", "tasks.min_tokens=10"]))
    with pytest.raises(ValueError, match="`tasks` has no use"):
        load_recipe(path, ["output=x", "task=finetune"])
