"""The command line: `memwrap list | fetch | train | eval | read | chat | serve | store | bench |
doctor | demo` and more; `memwrap --help` lists all.

Commands import what they need when they run, so that help and lists come at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memwrap.cli.chat_commands import chat, read
from memwrap.cli.linearize_command import linearize
from memwrap.cli.model_commands import compare, evaluate, export_model, run_harness
from memwrap.cli.serve_command import serve
from memwrap.cli.shared import MemoryName, hush, plain_errors, quiet
from memwrap.cli.store_commands import bench_commands, store_commands
from memwrap.io.version import VERSION

app = typer.Typer(
    name="memwrap",
    help="Attach memory to language models that already exist.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memwrap {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Attach memory to language models that already exist."""
    hush()


@app.command("list")
@plain_errors
def list_memories() -> None:
    """List the memories, where they attach, and what they do."""
    from memwrap.cli.catalogue import other_memories, own_memories

    for entry in sorted((*own_memories(), *other_memories()), key=lambda e: e.name):
        typer.echo(f"{entry.name:<16}{entry.places:<20}{entry.summary}")


@app.command()
@plain_errors
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct.")] = "smollm2",
) -> None:
    """Bring a real pretrained model once; from then on its name stands for it."""
    from memwrap.assets.fetching import fetch as bring

    typer.echo(f"{name} is in {bring(name)}")


@app.command()
@plain_errors
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A YAML file or name; settings."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A folder, name or repo id; a recipe's own without."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="stdlib, a folder, a file, or datasets:NAME.")
    ] = None,
    memory: MemoryName = None,
    document: Annotated[
        str | None,
        typer.Option("--document", help="Of `train cartridge`: a file to make slots of."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", help="Folder to write.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, run nothing.")
    ] = False,
) -> None:
    """Train: memwrap train RECIPE (with --model or --data in place of its own), or memwrap train
    --model DIR --data FOLDER --memory armt, or memwrap train cartridge --model DIR --document FILE,
    or memwrap train decoder --model DIR --data FOLDER -o DIR store=FOLDER.
    """
    from memwrap.training.finetune import RUN, is_first, preflight
    from memwrap.training.recipe_from_words import recipe_of
    from memwrap.training.stages import run

    words = list(words or [])
    if words[:1] == ["cartridge"]:
        from memwrap.cli.cartridge_command import train_cartridge_of

        train_cartridge_of(document, model, output, words[1:])
        return
    if words[:1] == ["decoder"]:
        from memwrap.cli.decoder_command import train_decoder_of

        train_decoder_of(model, data, output, words[1:])
        return
    loaded = recipe_of(words, model, data, memory, output)
    if dry_run:
        typer.echo(loaded.to_yaml(), nl=False)
        try:
            preflight(loaded)
        except (ValueError, OSError) as error:
            typer.echo(f"note: the recipe is fine, but here it would stop: {error}", err=True)
        return
    folder = run(loaded)
    if not is_first():  # of several processes one writes the folder and reports
        return
    about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    facts = [f"{about['seconds']:.0f} s"]
    if "steps" in about:
        steps = f"{about['steps']} of {about['planned_steps']} steps"
        facts = [f"{steps} (until {about['stopped_by']})", *facts]
        from memwrap.training.held_out import gain_in_words

        text, warning = gain_in_words(about)
        if text:
            typer.echo(text)
        if warning:
            typer.echo(warning, err=True)
    facts += [f"{k} {about[k]:.4f}" for k in ("loss", "eval_loss") if about.get(k) is not None]
    typer.echo(f"saved {folder}: {', '.join(facts)}")


@app.command()
@plain_errors
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Check this model's architecture (config only).")
    ] = None,
) -> None:
    """Show what is installed, what will be used, and whether a model can be given a memory."""
    from memwrap.cli import doctor as room

    quiet()
    versions = room.versions()
    for name, version in versions.items():
        typer.echo(f"{name:<16}{version}")
    typer.echo(f"{'versions':<16}{room.compared(versions)}")
    for line in room.devices():
        typer.echo(f"{'device':<16}{line}")
    typer.echo(f"{'ops':<16}{room.backends()}")
    if model is None:
        return
    about, trials = room.try_model(model)
    typer.echo(f"{'model':<16}{model}: {about}")
    for trial in trials:
        typer.echo(f"{trial.memory:<16}{trial.verdict}")
    if not any(trial.works for trial in trials):
        raise ValueError(f"No memory works with {model}.")


@app.command()
@plain_errors
def demo(
    output: Annotated[Path, typer.Option("-o", help="Folder for pictures and results.")] = Path(
        "demo-output"
    ),
    minutes: Annotated[float, typer.Option(help="How long it may take, once it is started.")] = 5.8,
) -> None:
    """Read a long document with a real model, ask about it, and measure the memory."""
    from memwrap.cli import demo as room

    if minutes <= 0:
        raise ValueError(f"`--minutes` is {minutes}; it must be positive.")
    quiet()
    room.main(output, minutes)


app.command()(read)
app.command()(chat)
app.command()(serve)
app.command()(linearize)
app.command("eval")(evaluate)
app.command()(compare)
app.command("export")(export_model)
app.command(
    "lm_eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(run_harness)
app.add_typer(store_commands, name="store")
app.add_typer(bench_commands, name="bench")


def main() -> None:
    """Run the `memwrap` command."""
    app()


__all__ = ["app", "main"]
