"""Settings of a saved model that claim much: nothing is allocated because a file says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import refused

import memwrap
from memwrap.model.weight_files import seal
from memwrap.testing.helpers import ids, wrapped

LARGE = 2**30


def claiming(folder: Path, memory: str, setting: str) -> Path:
    wrapped(memory).save_pretrained(folder, include_base=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    marks = config.pop("sealed")["marks"]
    config["memories"][0][setting] = LARGE
    path.write_text(json.dumps(config))
    seal(folder, marks)
    return folder


@pytest.mark.parametrize(
    ("memory", "setting"),
    [
        ("ahn", "window_size"),
        ("armt", "nu"),
        ("compact", "slots"),
        ("compressive", "compression_rate"),
        ("infllm", "window_size"),
        ("landmark", "top_k"),
        ("memory_decoder", "window_size"),
    ],
)
def test_what_would_take_far_more_than_the_weights_is_refused(
    memory: str, setting: str, tmp_path: Path
) -> None:
    with refused("much larger than the weights"):
        memwrap.load(claiming(tmp_path, memory, setting))


@pytest.mark.parametrize(
    ("memory", "setting"),
    [("window", "window_size"), ("memorizing", "cache_size"), ("infllm", "top_k")],
)
def test_a_limit_that_is_never_reached_costs_nothing(
    memory: str, setting: str, tmp_path: Path
) -> None:
    model = memwrap.load(claiming(tmp_path, memory, setting))
    with torch.no_grad():
        assert bool(model(ids(1, 30)).logits.isfinite().all())
