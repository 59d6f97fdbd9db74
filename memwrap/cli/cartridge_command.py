"""`memwrap train cartridge`: the slots of one document, trained."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import typer

from memwrap.cli.shared import load_model, load_tokenizer, settings_of

STATE, REPORT = "cartridge.safetensors", "cartridge.json"


def train_cartridge_of(
    document: str | None, model: str | None, output: Path | None, words: list[str]
) -> None:
    """Train the slots of one document and write them as a state, with a report beside it.

    Settings of the training (`minutes=5`) and of the memory (`num_sinks=8`) are told apart by
    their names.
    """
    from memwrap.cli.chat_commands import read_texts
    from memwrap.io.atomic_files import write_text
    from memwrap.training.cartridge import Cartridge, train_cartridge

    if document is None or model is None:
        raise ValueError("Give --document FILE and --model (a folder, a name as smollm2).")
    given = settings_of(words)
    field_names = {f.name for f in fields(Cartridge)}
    settings = Cartridge(**{n: v for n, v in given.items() if n in field_names})
    memory: dict[str, Any] = {"memory_size": None, "slots": settings.slots}
    memory |= {n: v for n, v in given.items() if n not in field_names}
    texts = read_texts([document])
    named = [f"{n}={'null' if v is None else v}" for n, v in memory.items()]
    loaded = load_model(model, None, "compact", named)
    tokenizer = load_tokenizer(model, loaded)
    trained = train_cartridge(loaded, tokenizer, "\n\n".join(texts.values()), settings, typer.echo)
    folder = output or Path("cartridge")
    folder.mkdir(parents=True, exist_ok=True)
    trained.state.save(folder / STATE)
    about = {"model": model, "memory": memory, "settings": asdict(settings), **trained.summary()}
    write_text(folder / REPORT, json.dumps(about, indent=2) + "\n")
    typer.echo(
        f"saved {folder / STATE}: {trained.steps} steps, {trained.state.nbytes / 1e6:.1f} MB\n"
        f"memwrap chat {model} --memory compact {' '.join(named)} --state {folder / STATE}"
    )


__all__ = ["train_cartridge_of"]
