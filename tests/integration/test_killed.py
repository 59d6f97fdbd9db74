"""A training that is killed at any moment and started again: the losses of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import ROOT, SETTINGS, documents, losses_of, wrapped
from transformers import TrainerCallback

from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.resuming import last_checkpoint
from memwrap.training.trainer import MemoryTrainer

STEPS = 10

# Trains in a child of itself, kills it with SIGKILL some steps on, at any moment of a step or of
# the writing of a checkpoint, and goes on from what is there.
_SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:4]
import test_killed

folder, kills, chance = Path(sys.argv[1]), 0, random.Random(int(sys.argv[4]))
for _ in range(4):
    child = os.fork()
    if not child:
        test_killed.train(folder / "killed")
        os._exit(0)
    wanted = test_killed.steps(folder / "killed") + chance.randint(1, 3)
    while test_killed.steps(folder / "killed") < wanted and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    try:
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    except (ProcessLookupError, ChildProcessError):
        break  # it came to its end
test_killed.train(folder / "killed")
test_killed.train(folder / "straight")
print(kills)
"""


def steps(folder: Path) -> int:
    """Steps that were made, those of killed trainings too."""
    path = folder / "steps"
    return path.stat().st_size if path.exists() else 0


def train(folder: Path) -> list[float]:
    """Train to the end, from the last whole checkpoint if there is one; all losses."""

    class Note(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            with (folder / "steps").open("a") as file:
                file.write("x")

    folder.mkdir(exist_ok=True)
    settings = SETTINGS | {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
    args = MemoryTrainingArguments(
        output_dir=str(folder / "run"), save_total_limit=3, segment_curriculum="0:2,4:5",
        vary_segments=True, **settings,
    )  # fmt: skip
    model = wrapped("armt", bptt_segments=2, value_init="normal")
    data = documents([40, 21, 17, 26, 33, 12])
    trainer = MemoryTrainer(model, args, train_dataset=data, callbacks=[Note()])
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "run") is not None)
    (folder / "losses.json").write_text(json.dumps(losses_of(trainer)))
    return losses_of(trainer)


@pytest.mark.proof("Training killed by SIGKILL and resumed: the same losses", "accelerate")
@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(n, marks=pytest.mark.full) for n in range(2, 8))]
)
@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_losses(tmp_path: Path, seed: int) -> None:
    tests = ROOT / "tests"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, tmp_path, tests, tests / "integration", str(seed)],
        capture_output=True, text=True, cwd=ROOT, timeout=580, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 2, "nothing was killed: the test proves nothing"
    killed, straight = (
        json.loads((tmp_path / name / "losses.json").read_text()) for name in ("killed", "straight")
    )
    assert len(straight) == STEPS
    assert killed == straight
    assert steps(tmp_path / "straight") == STEPS <= steps(tmp_path / "killed")


def test_a_run_that_had_reached_its_end_makes_no_further_step(tmp_path: Path) -> None:
    """Killed behind its last checkpoint; transformers alone would train one step more."""
    losses = train(tmp_path)
    before = (tmp_path / "run" / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes()
    assert train(tmp_path) == losses and steps(tmp_path) == STEPS
    assert (tmp_path / "run" / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes() == before


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """What a kill in the middle of writing leaves, and what a later one finds."""
    straight = train(tmp_path / "a")
    run = tmp_path / "a" / "run"
    newest = last_checkpoint(run)
    assert newest == run / f"checkpoint-{STEPS}"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_checkpoint(run) == run / f"checkpoint-{STEPS - 1}"
    assert train(tmp_path / "a") == straight
    for file in run.glob("checkpoint-*/trainer_state.json"):
        file.unlink()
    assert last_checkpoint(run) is None
    args = MemoryTrainingArguments(output_dir=str(run), **SETTINGS)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        MemoryTrainer(wrapped("rmt"), args).train(resume_from_checkpoint=True)
