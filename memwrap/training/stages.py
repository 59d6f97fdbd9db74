"""Runs that follow each other: a recipe's stages, each with its own folder, log and resume."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import memwrap
from memwrap.io.atomic_files import write_text
from memwrap.io.reading import read_json
from memwrap.training.finetune import (
    CHECKPOINTS,
    RECIPE,
    RUN,
    describe_run,
    is_first,
    preflight,
    run_recipe,
)
from memwrap.training.layer_choice import CHOICE, choose_layers
from memwrap.training.recipe import Recipe
from memwrap.training.resuming import last_checkpoint

STAGES = "stages"


def run(recipe: Recipe) -> Path:
    """Do what a recipe says, stage by stage where it has stages.

    With `resume` the stages that have ended stay as they are, and the one that was stopped goes
    on from its last checkpoint.

    Returns:
        The output folder, loadable by `memwrap.load`.

    Raises:
        ValueError: as `run_recipe`.
    """
    if not recipe.runs:
        return run_recipe(recipe)
    output = Path(recipe.output)
    if recipe.resume:
        if not (output / STAGES).is_dir():
            raise ValueError(f"There are no stages in {output} to resume; leave resume=true out.")
    else:
        preflight(recipe)
        shutil.rmtree(output / STAGES, ignore_errors=True)
    begun = time.monotonic()
    facts: dict[str, Any] = {}
    layers: list[int] | None = None
    chosen_from = recipe.init_from
    waiting = recipe.layer_choice is not None
    for index, (name, stage) in enumerate(zip(recipe.stages or {}, recipe.runs, strict=True)):
        if waiting and not stage.trainer.mixer_matching:
            chosen_from = str(output / STAGES / CHOICE)
            layers = choose_layers(recipe, stage, chosen_from)
            waiting = False
            stage = replaced(stage, layers, chosen_from)
        elif layers is not None:
            stage = replaced(stage, layers, recipe.runs[index - 1].output)
        print(f"stage {index + 1} of {len(recipe.runs)}: {name}", flush=True)
        facts[name] = _ended(stage, recipe.resume) or _run_stage(stage, recipe.resume)
    if is_first():
        _hand_over(Path(recipe.runs[-1].output), output)
        last = facts[name]
        about = describe_run(recipe) | {"stages": facts, "layers": layers}
        about |= {k: last.get(k) for k in ("loss", "eval_loss")}
        about["seconds"] = round(time.monotonic() - begun, 1)
        write_text(output / RECIPE, recipe.to_yaml())
        write_text(output / RUN, json.dumps(about, indent=2) + "\n")
        if layers is not None:
            shutil.copy(output / STAGES / CHOICE / f"{CHOICE}.json", output)
    return output


def replaced(stage: Recipe, layers: list[int], init_from: str | None) -> Recipe:
    """Return a stage's recipe for a model of which `layers` are converted."""
    memory = {**(stage.memory or {}), "layers": layers}
    return replace(stage, memory=memory, init_from=init_from)


def _ended(stage: Recipe, resume: bool) -> dict[str, Any] | None:
    """Return what a stage that has ended wrote of itself."""
    path = Path(stage.output) / RUN
    if not (resume and path.is_file()):
        return None
    facts = read_json(path)
    return facts if isinstance(facts, dict) else None


def _run_stage(stage: Recipe, resume: bool) -> dict[str, Any]:
    """Run a stage, from its last checkpoint where it was stopped behind one."""
    stopped = resume and last_checkpoint(Path(stage.output) / CHECKPOINTS) is not None
    stage.resume, stage.overwrite = stopped, resume
    folder = run_recipe(stage)
    return read_json(folder / RUN) if is_first() else {}


def _hand_over(last: Path, output: Path) -> None:
    """Save the last stage's model as the output's."""
    memwrap.load(last).save_pretrained(output)
    try:
        tokenizer = AutoTokenizer.from_pretrained(last)
    except (OSError, ValueError):  # recall has none
        return
    tokenizer.save_pretrained(output)


__all__ = ["run"]
