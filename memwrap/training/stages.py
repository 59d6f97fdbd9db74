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
    facts, layers, last = _run_all(recipe)
    if is_first():
        _hand_over(last, Path(recipe.runs[-1].output), output)
        about = describe_run(recipe) | {"stages": facts, "layers": layers}
        about |= {k: [*facts.values()][-1].get(k) for k in ("loss", "eval_loss")}
        about["seconds"] = round(time.monotonic() - begun, 1)
        write_text(output / RECIPE, recipe.to_yaml())
        write_text(output / RUN, json.dumps(about, indent=2) + "\n")
        if layers is not None:
            shutil.copy(output / STAGES / CHOICE / f"{CHOICE}.json", output)
    return output


def _run_all(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], list[int] | None, Path]:
    """Run the stages, and choose layers where the recipe says so: behind the stages that match
    mixers.

    Returns:
        What each stage wrote of itself, the layers that are converted where they were chosen, and
        the folder of the last model.
    """
    facts: dict[str, dict[str, Any]] = {}
    layers: list[int] | None = None
    before, choice = recipe.init_from, str(Path(recipe.output) / STAGES / CHOICE)
    for name, planned in zip(recipe.stages or {}, recipe.runs, strict=True):
        stage = planned
        if recipe.layer_choice is not None and layers is None and not stage.trainer.mixer_matching:
            layers, before = choose_layers(recipe, stage, choice), choice
        if layers is not None:
            stage = replace(
                stage, memory={**(stage.memory or {}), "layers": layers}, init_from=before
            )
        print(f"stage {len(facts) + 1} of {len(recipe.runs)}: {name}", flush=True)
        facts[name] = _ended(stage, recipe.resume) or _run_stage(stage, recipe.resume)
        before = stage.output
    if recipe.layer_choice is not None and layers is None:
        last = replace(recipe.runs[-1], init_from=before)
        layers, before = choose_layers(recipe, last, choice), choice
    return facts, layers, Path(before or "")


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
    stage.source = str(Path(stage.output) / RECIPE)  # what runs it again
    folder = run_recipe(stage)
    return read_json(folder / RUN) if is_first() else {}


def _hand_over(model: Path, stage: Path, output: Path) -> None:
    """Save a model and the last stage's tokenizer as the output's."""
    memwrap.load(model).save_pretrained(output)
    try:
        tokenizer = AutoTokenizer.from_pretrained(stage)
    except (OSError, ValueError):  # recall has none
        return
    tokenizer.save_pretrained(output)


__all__ = ["run"]
