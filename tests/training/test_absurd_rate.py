"""A learning rate that no training survives: it stops and says so, or its weights are finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import ids, tiny
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.trainer import MemoryTrainer

FAST = ("rmt", "lolcats")
MEMORIES = [n if n in FAST else pytest.param(n, marks=pytest.mark.full)
            for n in memwrap.available()]  # fmt: skip


def trainer(name: str, rate: float, folder: Path, **settings: Any) -> MemoryTrainer:
    model = memwrap.wrap(build("llama"), tiny(name, **settings)).train()
    args = MemoryTrainingArguments(
        output_dir=str(folder), learning_rate=rate, max_grad_norm=0.0, max_steps=4, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=2, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"input_ids": ids(1, n, seed=n)[0]} for n in (40, 21, 30, 17)]
    return MemoryTrainer(model, args, train_dataset=rows)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e4, 1e30])
@pytest.mark.parametrize("name", MEMORIES)
def test_it_stops_or_stays_finite(name: str, rate: float, tmp_path: Path) -> None:
    training = trainer(name, rate, tmp_path)
    try:
        training.train()
    except ValueError as error:
        assert "the training has failed. Lower `learning_rate`" in str(error)
        assert "step" in str(error)
    else:
        assert rate == 1e4, "no number survives the other"
        assert all(bool(p.isfinite().all()) for p in training.model.parameters())  # type: ignore[union-attr]


def test_streaming_stops_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in step 2: the training has failed"):
        trainer("rmt", 1e30, tmp_path, bptt_segments=1).train()


@pytest.mark.parametrize("where", ["memory", "backbone"])
def test_what_is_not_finite_is_neither_saved_nor_loaded(where: str, tmp_path: Path) -> None:
    model = memwrap.wrap(build("llama"), tiny("rmt"))
    model.save_pretrained(tmp_path, include_base=True)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    broken: Tensor = model.memories["rmt"].tokens
    if where == "backbone":
        broken = model.backbone.get_output_embeddings().weight
    with torch.no_grad():
        broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite; it is not saved"):
        model.save_pretrained(tmp_path, include_base=True)
    assert before == {f.name: f.read_bytes() for f in tmp_path.iterdir()}
