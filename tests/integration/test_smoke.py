"""A short look at everything, for releases of other libraries that came out after the tested ones
(`make smoke-newest`). Needs no package beside memwrap's own and pytest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import memwrap
from memwrap import exporting
from memwrap.memories.protocol import places_of
from memwrap.memories.registry import memory_class
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_greedy,
    assert_memory_matters,
    assert_same_states,
    ids,
    wrapped,
)
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.trainer import MemoryTrainer

# One for every place; two where they reach it in different ways.
MEMORIES = ("rmt", "memoryprompt", "armt", "landmark", "window", "infini", "knnlm")
PAIRS = pytest.mark.parametrize(
    ("memory", "family"), [(m, f) for m in MEMORIES for f in ("llama", "qwen3")]
)
SETTINGS: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
    "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
}  # fmt: skip


def places(memories: Iterable[str]) -> set[str]:
    return set().union(*(places_of(memory_class(memory)) for memory in memories))


def test_every_place_has_a_memory_here() -> None:
    assert places(MEMORIES) == places(memwrap.available())


@PAIRS
def test_reads_and_generates(memory: str, family: str) -> None:
    model, text = wrapped(memory, family), ids(1, 2 * SEGMENT + 3)
    assert_memory_matters(model, text)
    state, logits = model.new_state(1), []
    with torch.no_grad():
        for piece in text.split(5, 1):
            logits.append(model(piece, cache=state).logits)
        assert_close(torch.cat(logits, 1), model(text).logits, label="pieces")
    assert_same_states(model.read(text), state)
    got = model.generate(text, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert_greedy(model, text, got[:, text.shape[1] :])


# peft asks a model by a name that transformers 5.23 has replaced.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@PAIRS
def test_trains_saves_and_loads(memory: str, family: str, tmp_path: Path) -> None:
    model = wrapped(memory, family)
    model.add_lora(LoraConfig(r=2, target_modules="all-linear"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = MemoryTrainer(
        model,
        MemoryTrainingArguments(output_dir=str(tmp_path / "run"), **SETTINGS),
        train_dataset=[{"input_ids": row} for row in ids(2, 2 * SEGMENT + 3)],
    )
    assert trainer.train().training_loss > 0
    changed = [n for n, p in before.items() if not torch.equal(model.get_parameter(n), p)]
    assert any("lora_" in n for n in changed)
    assert any("memory_modules" in n for n in changed) or not list(model.memory_parameters())
    model.eval().save_pretrained(tmp_path / "model")
    again = memwrap.load(tmp_path / "model", build(family))
    text, more = ids(1, 2 * SEGMENT + 3, seed=1), ids(1, 4, seed=2)
    state = model.read(text)
    state.save(tmp_path / "state.safetensors")
    with torch.no_grad():
        want = model(more, cache=state).logits
        loaded = memwrap.MemoryState.load(tmp_path / "state.safetensors", again)
        assert torch.equal(again(more, cache=loaded).logits, want)


@pytest.mark.slow
def test_loads_without_memwrap(tmp_path: Path) -> None:
    found = exporting.export(wrapped("armt"), tmp_path / "exported")
    assert found is not None and found.generates and found.difference < 1e-5
