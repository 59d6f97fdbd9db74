"""The command line: `memwrap list | train | eval | read | chat | store | bench | doctor | demo`
and more; `memwrap --help` lists all."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging as transformers_logging

import memwrap
from memwrap.assets import asset
from memwrap.cli.shared import load_model, load_tokenizer, plain_errors
from memwrap.cli.store_commands import bench_commands, store_commands
from memwrap.memories.protocol import places_of
from memwrap.memories.registry import memory_class

app = typer.Typer(
    name="memwrap",
    help="Attach memory to language models that already exist.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(store_commands, name="store")
app.add_typer(bench_commands, name="bench")

Model = Annotated[str, typer.Option("--model", help="A saved model: folder, shipped name or repo.")]


@app.command("list")
@plain_errors
def list_memories() -> None:
    """List the memories, where they attach, and what they do."""
    for name in memwrap.available():
        try:
            config = memwrap.config_class(name)
        except ValueError as error:  # of another package; the others are fine
            typer.echo(f"{name:<16}{'broken':<16}{error}")
            continue
        summary = " ".join((config.__doc__ or "").split("\n\n")[0].split())
        typer.echo(f"{name:<16}{', '.join(places_of(memory_class(name))):<16}{summary}")


@app.command()
@plain_errors
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, run nothing.")
    ] = False,
) -> None:
    """Run a recipe: memwrap train armt_lora_tiny trainer.max_minutes=5."""
    from memwrap.training.finetune import RUN, is_first, preflight, run_recipe
    from memwrap.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        typer.echo(loaded.to_yaml(), nl=False)
        try:
            preflight(loaded)
        except ValueError as error:
            typer.echo(f"note: the recipe is fine, but here it would stop: {error}", err=True)
        return
    folder = run_recipe(loaded)
    if not is_first():  # of several processes one writes the folder and reports
        return
    about = json.loads((folder / RUN).read_text(encoding="utf-8"))
    facts = [f"{about['seconds']:.0f} s"]
    if "steps" in about:
        facts = [f"{about['steps']} steps (until {about['stopped_by']})", *facts]
    facts += [f"{k} {about[k]:.4f}" for k in ("loss", "eval_loss") if about.get(k) is not None]
    typer.echo(f"saved {folder}: {', '.join(facts)}")


@app.command("eval")
@plain_errors
def evaluate(
    model_dir: Annotated[str, typer.Argument(help="A saved model: folder, shipped name or repo.")],
    task: Annotated[
        str,
        typer.Option(help="perplexity, recall, linear-usage, or tasks: passkey,vt,..."),
    ] = "perplexity",
    documents: Annotated[
        str, typer.Option(help="stdlib, a folder, a file, or datasets:NAME.")
    ] = "stdlib",
    split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    tokens: Annotated[int, typer.Option(help="Tokens read of each document.")] = 8192,
    count: Annotated[int, typer.Option(help="Documents.")] = 3,
    samples: Annotated[
        int | None, typer.Option(help="Recall: rows at each distance (256). Tasks: texts (20).")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tasks: tokens of the texts.")] = "1024,4096",
    output: Annotated[
        Path | None,
        typer.Option("-o", help="Folder to write (default: MODEL_DIR/eval)."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the backbone, as float32.")] = None,
) -> None:
    """Measure a model beside its controls; prints a table, writes JSON, a report and a plot."""
    from memwrap.evaluation import run

    suite = run.suite_tasks(task)
    model = load_model(model_dir, dtype)
    folder = asset(model_dir) or Path(model_dir)
    results: run.Results
    if task in ("perplexity", "linear-usage"):
        part = None if split == "all" else split
        rows = run.documents(documents, part, load_tokenizer(model_dir, model), tokens, count)
        results = (run.perplexity if task == "perplexity" else run.linear_usage)(model, rows)
    elif task == "recall":
        results = run.recall(model, folder, samples or 256)
    else:
        tokenizer = load_tokenizer(model_dir, model)
        results = run.tasks(model, tokenizer, suite, lengths, samples or 20, model_dir)
    typer.echo(run.table(results))
    if output is None:
        output = folder / "eval" if folder.is_dir() and asset(model_dir) is None else Path("eval")
    for path in run.write(results, output, title=model_dir):
        typer.echo(f"wrote {path}")


@app.command(
    "lm_eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@plain_errors
def run_harness(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval with saved models: --model memwrap --model_args pretrained=DIR."""
    from memwrap.cli import lm_eval_model as harness

    harness.main(context.args)


@app.command()
@plain_errors
def compare(
    results: Annotated[list[Path], typer.Argument(help="JSON files that `memwrap eval` wrote.")],
    output: Annotated[Path | None, typer.Option("-o", help="HTML file to write.")] = None,
) -> None:
    """Put several results side by side."""
    from memwrap.evaluation import report

    names = [str(path) for path in results]
    lines = report.rows({n: report.load_result(p) for n, p in zip(names, results, strict=True)})
    typer.echo(report.markdown(lines))
    if output is not None:
        report.write_comparison(lines, output)
        typer.echo(f"wrote {output}")


@app.command("export")
@plain_errors
def export_model(
    model_dir: Annotated[str, typer.Argument(help="A saved model: folder, shipped name or repo.")],
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    push: Annotated[str | None, typer.Option(help="Then upload it to this Hub repo.")] = None,
    licence: Annotated[str | None, typer.Option(help="For the card, as apache-2.0.")] = None,
    check: Annotated[bool, typer.Option(help="Load it without memwrap and compare.")] = True,
    dtype: Annotated[str | None, typer.Option(help="Of the backbone, as float32.")] = None,
) -> None:
    """Write a checkpoint that loads with transformers alone (merged adapters, code, card)."""
    from memwrap import exporting
    from memwrap.exporting.card import about_run

    model = load_model(model_dir, dtype)
    about = about_run(asset(model_dir) or Path(model_dir))
    about |= {"licence": licence} if licence else {}
    found = exporting.export(
        model, folder, tokenizer=load_tokenizer(model_dir, model), about=about, check=check
    )
    if found is not None:
        same = "the same ids" if found.generates else "other ids (rounding)"
        typer.echo(f"loads without memwrap: logits within {found.difference:.1e}, generates {same}")
    typer.echo(f"wrote {folder}")
    if push:
        typer.echo(f"pushed {exporting.push(folder, push)}")


@app.command()
@plain_errors
def read(
    file: Annotated[str, typer.Argument(help="A .txt, .md or .pdf file, or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", help="State file to write.")],
    model: Model,
    state: Annotated[Path | None, typer.Option(help="A state file to continue.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the backbone, as float32.")] = None,
) -> None:
    """Read text into a state file."""
    from memwrap.data.documents import load_documents

    texts = load_documents(file)
    loaded = load_model(model, dtype)
    tokenizer = load_tokenizer(model, loaded)
    start = time.monotonic()
    current = memwrap.MemoryState.load(state, loaded) if state is not None else None
    before = int(current.tokens_seen[0]) if current is not None else 0
    for text in texts:
        if current is not None:
            current = loaded.close_segment(current)
        ids = tokenizer(text.text, verbose=False)["input_ids"]
        current = loaded.read([ids], state=current, progress=True)
    if current is None:
        raise ValueError(f"There is no text in {file}.")
    current.save(output)
    number, seconds = int(current.tokens_seen[0]) - before, time.monotonic() - start
    size = output.stat().st_size / 1e6
    typer.echo(f"read {number:,} tokens in {seconds:.1f} s; wrote {output} ({size:.1f} MB)")


@app.command()
@plain_errors
def chat(
    model: Model,
    state: Annotated[Path | None, typer.Option(help="A state file of `memwrap read`.")] = None,
    ask: Annotated[str | None, typer.Option(help="One question, then leave.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="Of the backbone, as float32.")] = None,
) -> None:
    """Ask about what was read. Without --ask: /reset, /save FILE and /quit are commands."""
    from transformers import TextStreamer

    from memwrap.model.conversation import Conversation

    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("`--max-new-tokens` must be at least 1, `--temperature` 0 or more.")
    loaded = load_model(model, dtype)
    tokenizer = load_tokenizer(model, loaded)
    memory = memwrap.MemoryState.load(state, loaded) if state is not None else None
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    talk = Conversation(loaded, tokenizer, memory, max_new_tokens=max_new_tokens, **sampling)
    if ask is not None:
        typer.echo(talk.ask(ask))
        return
    seen = int(memory.tokens_seen[0]) if memory is not None else 0
    typer.echo(f"{seen:,} tokens read. /reset, /save FILE, /quit")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            talk.reset()
        elif line.startswith("/save"):
            _save_talk(talk, line.removeprefix("/save").strip())
        elif line:
            talk.ask(line, streamer)


def _save_talk(talk: Any, path: str) -> None:
    if not path or talk.state is None:
        typer.echo("give a file (/save FILE), after something was said or read", err=True)
        return
    talk.state.save(path)
    typer.echo(f"wrote {path}")


@app.command()
@plain_errors
def doctor(
    model: Annotated[
        str | None, typer.Option("--model", help="Check this model's architecture (config only).")
    ] = None,
) -> None:
    """Show what is installed, what will be used, and whether a model can be given a memory."""
    from memwrap.cli import doctor as room

    transformers_logging.disable_progress_bar()
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
    output: Annotated[
        Path, typer.Option("-o", help="Folder for adapters, plots and results.")
    ] = Path("demo-output"),
    minutes: Annotated[float, typer.Option(help="How long to fine-tune.")] = 2.0,
) -> None:
    """Fine-tune the shipped model briefly and measure it beside its controls."""
    from memwrap.cli import demo as room

    if minutes <= 0:
        raise ValueError(f"`--minutes` is {minutes}; it must be positive.")
    room.main(str(output), minutes)


def main() -> None:
    """Run the `memwrap` command."""
    app()


__all__ = ["app", "main"]
