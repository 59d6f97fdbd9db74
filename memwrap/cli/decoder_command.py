"""`memwrap train decoder`: a Memory Decoder that learns what a store of text says."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from memwrap.cli.shared import load_model, load_tokenizer, settings_of

REPORT = "decoder.json"
OWN = {"store": None, "split": "train", "eval_split": "validation", "start": False}
# Of a text that the decoder's share is chosen with, and so many texts.
TOKENS, COUNT = 4096, 8


def train_decoder_of(
    model: str | None, data: str | None, output: Path | None, words: list[str]
) -> None:
    """Train a Memory Decoder on the documents of a store (`store=FOLDER`, made by `memwrap store
    build` with the same model and data), choose its share on other documents, and save the model.

    `start=true`: it begins with layers of the model itself. Other settings are those of the
    training (`steps=1000`) and of the memory (`num_layers=3`), told apart by their names.
    """
    import torch

    import memwrap
    from memwrap.data.documents import load_documents
    from memwrap.io.atomic_files import write_text
    from memwrap.stores import open_store
    from memwrap.training import decoder_training as training

    given = OWN | settings_of(words)
    options = {name: given.pop(name) for name in OWN}
    if model is None or data is None or output is None or options["store"] is None:
        raise ValueError("Give --model, --data, -o FOLDER and store=FOLDER (memwrap store build).")
    known = {f.name for f in fields(training.DecoderTraining)}
    settings = training.DecoderTraining(**{n: v for n, v in given.items() if n in known})
    fields_of_memory = {n: v for n, v in given.items() if n not in known}
    config = memwrap.MemoryDecoderConfig.from_dict(fields_of_memory)
    store = open_store(options["store"])
    about = {"key": store.notes.get("key", "ffn"), "metric": store.metric}
    size = store.notes.get("segment_size", config.segment_size)
    named = [f"{n}={v}" for n, v in {**about, "segment_size": size}.items()]
    searching = load_model(model, None, "knnlm", named)
    searching.memories["knnlm"].attach(store)
    tokenizer, held = load_tokenizer(model, searching), set(store.documents)

    def read(split: str) -> dict[str, Any]:
        """Read the documents of a split, as ids."""
        documents = load_documents(data, None if split == "all" else split)
        encoded = {d.name: tokenizer(d.text, verbose=False)["input_ids"] for d in documents}
        return {name: torch.tensor(ids) for name, ids in encoded.items()}

    texts = {name: ids for name, ids in read(options["split"]).items() if name in held}
    typer.echo(f"{len(texts):,} of the store's {len(held):,} documents: asking for neighbours")
    lessons = list(training.lessons_of(searching, texts, settings.top_k))
    new: Any = memwrap.wrap(memwrap.unwrap(searching), config)
    memory = new.memories[training.DECODER]
    if options["start"]:
        memory.start_from(new.backbone)
    heat = store.notes.get("tuned", {}).get("temperature", 1.0)
    losses = training.train_decoder(new, lessons, settings, heat, typer.echo)
    new.eval()
    rows = list(read(options["eval_split"]).values())[:COUNT] if options["eval_split"] else []
    report: dict[str, Any] = {"steps": len(losses), "last": losses[-1:]}
    if rows:
        pairs = [training.token_likelihoods(new, row[:TOKENS]) for row in rows]
        share, report["nats"] = training.best_weight(pairs)
        new.memory_settings(training.DECODER, interpolation=share)
    new.save_pretrained(output)
    tokenizer.save_pretrained(output)
    report["parameters"] = sum(p.numel() for p in memory.parameters())
    write_text(output / REPORT, json.dumps(report, indent=2) + "\n")
    typer.echo(f"saved {output}: {len(losses)} steps, share {memory.config.interpolation:g}")


__all__ = ["train_decoder_of"]
