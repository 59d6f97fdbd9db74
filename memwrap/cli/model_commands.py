"""The commands that measure and publish a model: `memwrap eval`, `compare`, `lm_eval`, `export`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwrap.cli.shared import (
    Dtype,
    MemoryName,
    ModelName,
    Passes,
    Settings,
    load_model,
    load_tokenizer,
    plain_errors,
)

if TYPE_CHECKING:
    from memwrap.evaluation.run import Results


@plain_errors
def evaluate(
    model: ModelName,
    settings: Settings = None,
    memory: MemoryName = None,
    task: Annotated[
        str,
        typer.Option(
            help="perplexity, recall, conversations, linear-usage, head-budgets, or tasks: vt,..."
        ),
    ] = "perplexity",
    documents: Annotated[
        str, typer.Option(help="stdlib, a folder, a file, or datasets:NAME.")
    ] = "stdlib",
    split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    tokens: Annotated[int, typer.Option(help="Tokens read of each document.")] = 8192,
    count: Annotated[int, typer.Option(help="Documents.")] = 3,
    samples: Annotated[
        int | None,
        typer.Option(help="Recall: rows a distance (256). Tasks: texts (20). Conversations (3)."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tasks: tokens of the texts.")] = "1024,4096",
    turns: Annotated[str, typer.Option(help="Conversations: turns of the user.")] = "16,64",
    passes: Passes = 1,
    output: Annotated[
        Path | None,
        typer.Option("-o", help="Folder to write (default: eval in a saved model's, ./eval)."),
    ] = None,
    dtype: Dtype = None,
) -> None:
    """Measure a model beside its controls; prints a table, writes JSON, a report and a plot."""
    from memwrap.assets import asset
    from memwrap.data.documents import load_documents
    from memwrap.evaluation import run

    suite, part = run.suite_tasks(task, passes), None if split == "all" else split
    by_text = task in ("perplexity", "linear-usage", "head-budgets")
    texts = load_documents(documents, part) if by_text else []
    run.check_numbers(lengths, turns)
    if task == "head-budgets" and memory == "compact":
        settings = ["memory_size=null", *(settings or [])]
    loaded = load_model(model, dtype, memory, settings)
    folder = asset(model) or Path(model)
    load_words = partial(load_tokenizer, model, loaded)
    if by_text:
        rows = run.documents(documents, part, load_words(), tokens, count, texts)
        if task == "head-budgets":
            _head_budgets(loaded, rows, output)
            return
        measure = run.perplexity if task == "perplexity" else run.linear_usage
        results: Results = measure(loaded, rows)
    elif task == "recall":
        results = run.recall(loaded, folder, samples or 256, passes)
    elif task == "conversations":
        results = run.conversations(loaded, load_words(), turns, samples or 3, model)
    else:
        results = run.tasks(loaded, load_words(), suite, lengths, samples or 20, model, passes)
    typer.echo(run.table(results))
    beside = folder.is_dir() and asset(model) is None and memory is None
    output = output or (folder / "eval" if beside else Path("eval"))
    title = model if memory is None else f"{model} with {memory}"
    for path in run.write(results, output, title=title):
        typer.echo(f"wrote {path}")


def _head_budgets(model: Any, rows: Any, output: Path | None) -> None:
    from memwrap.evaluation.head_budgets import head_budgets

    budgets = head_budgets(model, rows, progress=True)
    typer.echo(budgets.table())
    path = (output or Path("eval")) / "head-budgets.json"
    budgets.save(path)
    typer.echo(f"wrote {path}: its `shares` are the setting `budgets`")


@plain_errors
def run_harness(context: typer.Context) -> None:
    """Run EleutherAI's lm_eval with saved models: --model memwrap --model_args pretrained=DIR."""
    from memwrap.cli import lm_eval_model as harness

    harness.main(context.args)


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


@plain_errors
def export_model(
    model: ModelName,
    folder: Annotated[Path, typer.Argument(help="New folder to write.")],
    settings: Settings = None,
    memory: MemoryName = None,
    push: Annotated[str | None, typer.Option(help="Then upload it to this Hub repo.")] = None,
    licence: Annotated[str | None, typer.Option(help="For the card, as apache-2.0.")] = None,
    check: Annotated[bool, typer.Option(help="Load it without memwrap and compare.")] = True,
    dtype: Dtype = None,
) -> None:
    """Write a checkpoint that loads with transformers alone (merged adapters, code, card)."""
    from memwrap import exporting
    from memwrap.assets import asset
    from memwrap.exporting.card import about_run

    loaded = load_model(model, dtype, memory, settings)
    about = about_run(asset(model) or Path(model))
    about |= {"licence": licence} if licence else {}
    result = exporting.export(
        loaded, folder, tokenizer=load_tokenizer(model, loaded), about=about, check=check
    )
    if result is not None:
        same = "the same ids" if result.generates else "other ids (rounding)"
        typer.echo(
            f"loads without memwrap: logits within {result.difference:.1e}, generates {same}"
        )
    typer.echo(f"wrote {folder}")
    if push:
        typer.echo(f"pushed {exporting.push(folder, push)}")


__all__ = ["compare", "evaluate", "export_model", "run_harness"]
