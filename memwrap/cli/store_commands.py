"""The commands `memwrap store build | tune | info | remove` and `memwrap bench stores`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import memwrap
from memwrap.assets import asset
from memwrap.cli.shared import Dtype, load_model, load_tokenizer, plain_errors, quiet
from memwrap.io.atomic_files import write_text
from memwrap.io.reading import read_json

if TYPE_CHECKING:
    from memwrap import KnnLMConfig

store_commands = typer.Typer(
    help="Stores of text that a kNN-LM searches.", no_args_is_help=True, rich_markup_mode=None
)
TINY = "tiny-lm"
bench_commands = typer.Typer(
    help="Measure parts of memwrap.", no_args_is_help=True, rich_markup_mode=None
)

Model = Annotated[str, typer.Option("--model", help="A base or a saved memwrap model.")]
Where = Annotated[str, typer.Argument(metavar="STORE", help="Folder, or postgresql:// URL.")]
Split = Annotated[str, typer.Option(help="train, validation, test or all.")]
SEGMENT = 512


def _with_memory(name: str, config: KnnLMConfig, dtype: str | None, *, from_words: bool) -> Any:
    """Load a model with a kNN-LM memory: a saved one that has it, or a base with `config`.

    Args:
        from_words: whether the config was asked for in words, which a saved model has already.
    """
    import torch

    from memwrap.assets.places import find_model
    from memwrap.backbones.auto_classes import load_backbone

    quiet()
    place = asset(name) or Path(name)
    about = place / "config.json"
    kind = read_json(about) if about.is_file() else {}
    if kind.get("model_type") == "memwrap":
        model = load_model(name, dtype)
        if "knnlm" not in model.memories:
            config.segment_size = model.segment_size
            new: Any = memwrap.wrap(memwrap.unwrap(model), *model.memory_configs, config)
            for memory, module in model.memories.items():
                new.memories[memory].load_state_dict(module.state_dict())
            return new.eval()
        if from_words:
            raise ValueError(
                f"{name} has kNN-LM settings of its own; leave --segment and --key out."
            )
        return model
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    base: Any = load_backbone(find_model(name), **options)
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    return memwrap.wrap(base, config).eval()


@store_commands.command("build")
@plain_errors
def build(
    corpus: Annotated[str, typer.Argument(help="stdlib, a folder, a file, or datasets:NAME.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder, or postgresql:// URL.")],
    model: Model = "tiny-lm",
    split: Split = "train",
    tokens: Annotated[int | None, typer.Option(help="Stop behind so many tokens.")] = None,
    segment: Annotated[int | None, typer.Option(help="Tokens read at once.")] = None,
    key: Annotated[str | None, typer.Option(help="ffn (as published) or hidden.")] = None,
    factory: Annotated[
        str | None, typer.Option(help="Of faiss, as HNSW32; default: by size.")
    ] = None,
    dtype: Dtype = None,
) -> None:
    """Build the datastore of a corpus. The same command again goes on where it was stopped."""
    from memwrap.data.documents import load_documents
    from memwrap.retrieval.datastore import build_store
    from memwrap.stores import new_store
    from memwrap.stores.urls import is_url

    settings: Any = {"key": key or "ffn"}  # checked by the config
    config = memwrap.KnnLMConfig(segment_size=segment or SEGMENT, **settings)
    loaded = _with_memory(model, config, dtype, from_words=bool(segment or key))
    memory = loaded.memories["knnlm"]
    documents = load_documents(corpus, None if split == "all" else split)
    options: dict[str, Any] = {} if is_url(output) else {"factory": factory}
    store = new_store(memory.width, memory.config.metric, path=output, **options)
    count = build_store(
        loaded, load_tokenizer(model, loaded), documents, store, tokens=tokens,
        source=f"{corpus}:{split}",
    )  # fmt: skip
    typer.echo(f"{count:,} entries of {len(store.documents):,} documents in {_shown(output)}")


def _shown(place: str) -> str:
    """Write a place without its password."""
    from memwrap.stores.urls import is_url

    return place if not is_url(place) else "the server"


@store_commands.command("tune")
@plain_errors
def tune(
    store: Where,
    model: Model = "tiny-lm",
    documents: Annotated[str, typer.Option(help="Text that is not in the store.")] = "stdlib",
    split: Split = "validation",
    tokens: Annotated[int, typer.Option(help="Tokens read of each document.")] = 4096,
    count: Annotated[int, typer.Option(help="Documents.")] = 4,
    top_k: Annotated[int, typer.Option(help="Neighbours.")] = 64,
    adaptive: Annotated[bool, typer.Option(help="Follow the distances.")] = False,
    dtype: Dtype = None,
) -> None:
    """Find lambda and temperature on validation text, and note them in the store."""
    from memwrap.evaluation.knnlm import tune as search
    from memwrap.evaluation.run import documents as read_documents
    from memwrap.stores import open_store

    opened = open_store(store)
    settings: Any = {"key": opened.notes.get("key", "ffn"), "metric": opened.metric}
    segment = opened.notes.get("segment_size", SEGMENT)
    config = memwrap.KnnLMConfig(segment_size=segment, top_k=top_k, adaptive=adaptive, **settings)
    loaded = _with_memory(model, config, dtype, from_words=False)
    loaded.memories["knnlm"].attach(opened)
    part = None if split == "all" else split
    rows = read_documents(documents, part, load_tokenizer(model, loaded), tokens, count)
    result = search(loaded, rows)
    typer.echo(result.table())
    typer.echo(f"without the store: {result.base:.4f} nats; {result.hits:.1%} of the tokens found")
    opened.note({"tuned": result.tuned()})
    typer.echo(f"noted in the store: {result.tuned()}")


@store_commands.command("info")
@plain_errors
def info(
    store: Where,
    check: Annotated[bool, typer.Option("--check", help="Read every byte.")] = False,
) -> None:
    """Show what a store holds."""
    from memwrap.stores import FaissStore, open_store

    opened = open_store(store)
    facts: dict[str, Any] = {
        "kind": opened.kind, "entries": f"{len(opened):,}", "width": opened.dim,
        "metric": opened.metric, "documents": f"{len(opened.documents):,}",
        "bytes": f"{opened.nbytes:,}", **{k: v for k, v in opened.notes.items() if k != "model"},
    }  # fmt: skip
    if isinstance(opened, FaissStore):
        facts |= {"index": opened.made_by or "none", "disk bytes": f"{opened.disk_bytes:,}"}
        if check:
            opened.verify()
            facts["files"] = "whole"
    for name, value in facts.items():
        typer.echo(f"{name:<16}{value}")


@store_commands.command("remove")
@plain_errors
def remove(
    store: Where, document: Annotated[str, typer.Argument(help="Name of a document.")]
) -> None:
    """Remove a document's entries."""
    from memwrap.stores import open_store

    opened = open_store(store)
    number = opened.remove_document(document)
    opened.commit()
    typer.echo(f"removed {number:,} entries; {len(opened):,} are left")


@bench_commands.command("stores")
@plain_errors
def bench_stores(
    entries: Annotated[int, typer.Option(help="Vectors.")] = 100_000,
    dim: Annotated[int, typer.Option(help="Their width.")] = 128,
    k: Annotated[int, typer.Option("--top-k", help="Neighbours.")] = 16,
    queries: Annotated[int, typer.Option(help="How many are asked.")] = 1000,
    stores: Annotated[str, typer.Option(help="Of torch, faiss, pgvector.")] = "torch,faiss",
    url: Annotated[str | None, typer.Option(help="Of a PostgreSQL server.")] = None,
    factory: Annotated[str | None, typer.Option(help="Of faiss; default: by size.")] = None,
    effort: Annotated[int | None, typer.Option(help="efSearch or nprobe of faiss.")] = None,
    output: Annotated[Path | None, typer.Option("-o", help="JSON file to write.")] = None,
) -> None:
    """Recall against exact search, build time, query time, and bytes a vector."""
    from memwrap.evaluation.store_bench import bench

    kinds = [name.strip() for name in stores.split(",") if name.strip()]
    result = bench(
        entries, dim, k, queries, kinds=kinds, url=url, factory=factory, effort=effort,
        say=typer.echo,
    )  # fmt: skip
    if output is not None:
        write_text(output, json.dumps(result, indent=2) + "\n")
        typer.echo(f"wrote {output}")


@bench_commands.command("memories")
@plain_errors
def bench_memories(
    model: Annotated[str, typer.Option("--model", help="The backbone.")] = TINY,
    train: Annotated[
        bool | None,
        typer.Option("--train/--no-train", help="Train each (default: for the tiny-lm alone)."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Of `memwrap list`; default: all.")] = None,
    budget: Annotated[int | None, typer.Option(help="--train: tokens seen on documents.")] = None,
    recall_budget: Annotated[
        int | None, typer.Option(help="--train: tokens seen on recall.")
    ] = None,
    megabytes: Annotated[str | None, typer.Option(help="--no-train: of state, as 4,16,64.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="--no-train: a folder or file to read.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="YAML file instead of the shipped.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", help="Folder; goes on with what is there (runs/...).")
    ] = None,
) -> None:
    """Compare memories: on a real model at equal bytes, or each trained with one budget."""
    names = [n.strip() for n in only.split(",")] if only else memwrap.available()
    for name in names:
        memwrap.config_class(name)
    trains = model == TINY if train is None else train
    foreign = {"--megabytes": megabytes, "--documents": documents} if trains else {
        "--budget": budget, "--recall-budget": recall_budget
    }  # fmt: skip
    for option, value in foreign.items():
        if value is not None:
            needed = "--no-train" if trains else "--train"
            raise ValueError(f"{option} is given, which goes with {needed}; give that too.")
    if trains:
        paths = _trained(model, plan, budget, recall_budget, names, output)
    else:
        paths = _as_they_come(model, plan, megabytes, documents, names, output)
    typer.echo(paths[0].read_text(encoding="utf-8"))
    typer.echo(f"wrote {' and '.join(map(str, paths))}")


def _trained(
    model: str, plan: Path | None, budget: int | None, recall_budget: int | None,
    names: list[str], output: Path | None,
) -> list[Path]:  # fmt: skip
    from memwrap.comparison.runs import Plan, compare, read_results
    from memwrap.comparison.tables import write_page

    folder = output or Path("runs/memories")
    loaded = Plan.load(model, plan, budget=budget, recall_budget=recall_budget)
    compare(loaded, folder, folder / "trained", names, say=typer.echo)
    return write_page(read_results(folder), folder, "memwrap bench memories")


def _as_they_come(
    model: str, plan: Path | None, megabytes: str | None, documents: str | None,
    names: list[str], output: Path | None,
) -> list[Path]:  # fmt: skip
    from memwrap.comparison.board import Board, load_board_plan
    from memwrap.comparison.board_page import write_board

    try:
        budgets = [float(word) for word in megabytes.split(",")] if megabytes else None
    except ValueError:
        raise ValueError(f"--megabytes is {megabytes!r}; give numbers, as 4,16,64.") from None
    folder = output or Path("runs/leaderboard")
    Board(model, folder, load_board_plan(plan, budgets=budgets, documents=documents)).run(names)
    return write_board(folder, f"memwrap bench memories --model {model}")


__all__ = ["bench_commands", "store_commands"]
