"""`trainer.report_to`: losses reach a tracker's files, and nothing leaves the machine."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from support import save_small_base

from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note who connects to other machines, and let none of them."""
    met: list[Any] = []
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
        ):
            met.append(address)
            raise OSError("this test has no network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true",
                        "TRACKIO_DIR": str(tmp_path / "trackio")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return met


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the trackers' own
@pytest.mark.parametrize(
    ("tracker", "written"),
    [
        ("tensorboard", "**/events.out.tfevents.*"),
        pytest.param("wandb", "wandb/offline-run-*/run-*.wandb", marks=pytest.mark.full),
        pytest.param("trackio", "trackio/*.db", marks=pytest.mark.full),
    ],
)
def test_losses_reach_a_trackers_files(
    tracker: str, written: str, tmp_path: Path, offline: list[Any]
) -> None:
    pytest.importorskip(tracker)
    base = save_small_base(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for index in range(40):
        text = " ".join(f"Line {n} of text {index} says {n * index}.\n" for n in range(20))
        (tmp_path / "texts" / f"text{index}.md").write_text(text)
    recipe = load_recipe(
        ROOT / "recipes" / "armt_lora_tiny.yaml",
        [f"model.name={base}", f"data.source={tmp_path / 'texts'}", f"output={tmp_path / 'run'}",
         "memory.segment_size=16", "memory.num_memory_tokens=2", "data.max_tokens=64",
         "data.min_tokens=8", "trainer.steps=2", "trainer.log_every=1", "trainer.device=cpu",
         "trainer.accumulation=1", "trainer.save_every=null", "lora.r=2",
         f"trainer.report_to={tracker}"],
    )  # fmt: skip
    run_recipe(recipe)
    (file,) = tmp_path.glob(written)
    assert offline == []
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        seen = EventAccumulator(str(file)).Reload()
        assert [event.step for event in seen.Scalars("train/loss")] == [1, 2]
    else:
        assert b"loss" in file.read_bytes()
