"""What a run does beside its steps: a time limit, the loss curve in a file, a quiet bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from memwrap.io.atomic_files import write_text
from memwrap.training.plots import plot_figures
from memwrap.training.watch import NormWatch

LOGGED = ("loss", "eval_loss", "grad_norm", "learning_rate")
"""What a row of the log holds beside `step` and `seconds`, and every memory's `state_norm`."""


def _rows_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the rows of a log up to a step: those of the run that is resumed."""
    if not step or not path.is_file():
        return []
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["step"] <= step]


class TimeLimit(TrainerCallback):
    """Stop after the step in which `minutes` have passed, with a checkpoint if any are saved.

    Attributes:
        reached: whether this is what stopped the run.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self.reached = False
        self._start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self._start < self.seconds or state.global_step >= state.max_steps:
            return
        self.reached = True
        control.should_training_stop = True
        control.should_save = args.save_strategy != "no"


class LossLog(TrainerCallback):
    """Write the loss curve to a file of JSON lines while the training runs.

    Args:
        path: the file.
        keep_until: rows up to this step are kept, as when a run is resumed from there.

    Attributes:
        rows: dicts of `step`, `seconds` and what of `LOGGED` there is.
    """

    def __init__(self, path: Path, keep_until: int = 0) -> None:
        self.path = path
        self.rows = _rows_until(path, keep_until)
        self._start = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0.0)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        values = {k: v for k, v in (logs or {}).items() if k in LOGGED or k.endswith("state_norm")}
        if not state.is_world_process_zero or not values.keys() & {"loss", "eval_loss"}:
            return
        seconds = round(time.monotonic() - self._start, 1)
        self.rows.append({"step": state.global_step, "seconds": seconds, **values})
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def last(self, name: str) -> float | None:
        """Return the latest value of `loss` or `eval_loss`."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)


class FigureLog(TrainerCallback):
    """Write what memories show of themselves (`Memory.figures`, such as Infini's gates) to a file
    of JSON lines, one value a layer and head, and how large their states become, one a layer; and
    plot it when the training ends.

    Args:
        path: the file; the plot gets its name with `.png`. Nothing is written for memories
            without figures or sums.
        keep_until: as in `LossLog`.

    Attributes:
        norms: of the trainer, once it is made.
    """

    def __init__(self, path: Path, keep_until: int = 0) -> None:
        self.path = path
        self.norms = NormWatch()
        self.rows = _rows_until(path, keep_until)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note the figures of now."""
        memories: dict[str, Any] = next(
            (m.memories for m in model.modules() if hasattr(m, "memories")), {}
        )
        values = {
            f"{name}.{figure}": [[round(float(v), 5) for v in row] for row in value]
            for name, memory in memories.items()
            for figure, value in memory.figures().items()
        }
        for name, layers in self.norms.largest.items():
            values[f"{name}.state_norm"] = [[round(v, 5)] for v in layers.values()]
        if not values or not state.is_world_process_zero:
            return
        if self.rows and self.rows[-1]["step"] == state.global_step:
            return
        self.rows.append({"step": state.global_step, **values})
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rows and state.is_world_process_zero:
            plot_figures(self.rows, self.path.with_suffix(".png"))


class Bar(ProgressCallback):
    """The progress bar with the loss beside it, instead of a printed dict a log; where time ends a
    run, its steps are all there were."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None and self.training_bar.n < self.training_bar.total:
            self.training_bar.total = self.training_bar.n
            self.training_bar.refresh()
        super().on_train_end(args, state, control, **kwargs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        shown = {k: f"{logs[k]:.4g}" for k in ("loss", "eval_loss") if logs and k in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


__all__ = ["Bar", "LossLog", "TimeLimit"]
