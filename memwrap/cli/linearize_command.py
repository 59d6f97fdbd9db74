"""`memwrap linearize`: a conversion of attention, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memwrap.cli.shared import plain_errors


@plain_errors
def linearize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a name as smollm2, or a repo id.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the memory (layers=auto keep=4), or of the recipe by full keys.",
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="What takes attention's place: liger, lolcats, ahn.")
    ] = "liger",
    stages: Annotated[
        str, typer.Option("--stages", help="Some of mixers,logits,text, in this order.")
    ] = "mixers,logits,text",
    data: Annotated[
        str, typer.Option("--data", help="stdlib, a folder, a file, or datasets:NAME.")
    ] = "stdlib",
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path(
        "runs/linearized"
    ),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe, run nothing.")
    ] = False,
) -> None:
    """Convert a model's attention in stages: layer by layer to what its softmax gives, then to the
    base's distribution, then on long text. A stopped run goes on with resume=true.
    """
    from memwrap.training.finetune import RUN, is_first
    from memwrap.training.linearize_recipe import linearize_recipe
    from memwrap.training.stages import run

    names = [name.strip() for name in stages.split(",")]
    recipe = linearize_recipe(model, memory, names, data, output, settings)
    if dry_run:
        typer.echo(recipe.to_yaml(), nl=False)
        return
    folder = run(recipe)
    if not is_first():
        return
    about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    for name, facts in about["stages"].items():
        typer.echo(
            f"{name}: {facts['steps']} of {facts['planned_steps']} steps, "
            f"{facts['seconds']:.0f} s, loss {facts['loss']:.4f}"
        )
    if about["layers"] is not None:
        typer.echo(f"converted layers: {about['layers']} (layer_choice.json says why)")
    typer.echo(f"saved {folder}: memwrap eval {folder} --task linear-usage")


__all__ = ["linearize"]
