"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from memwrap.io.reading import read_json


def last_checkpoint(folder: str | Path) -> Path | None:
    """Find the newest checkpoint of a run that is whole; None without one.

    transformers writes a checkpoint file by file into its folder, its own state last: where that
    is missing or cut off, the run was killed while it wrote.
    """
    checkpoints = []
    for state in Path(folder).glob("checkpoint-*/trainer_state.json"):
        number = state.parent.name.rpartition("-")[2]
        try:
            read_json(state)
        except (OSError, ValueError):
            continue
        if number.isdecimal():
            checkpoints.append((int(number), state.parent))
    return max(checkpoints)[1] if checkpoints else None


def check_loss(loss: Tensor, step: int) -> None:
    """Stop a training whose loss is not finite: no later step mends it, and transformers would show
    the mean of earlier losses instead.

    Raises:
        ValueError: says so.
    """
    if not bool(loss.isfinite()):
        raise ValueError(
            f"The loss is {float(loss)} in step {step + 1}: the training has failed. Lower "
            "`learning_rate` or `memory_learning_rate`, and go on from an earlier checkpoint."
        )
