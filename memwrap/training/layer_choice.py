"""Which layers keep their softmax: those whose conversion costs most recall (HALO, arXiv
2601.22156; Jet-Nemotron, arXiv 2508.15884).

One layer at a time is converted, the others are as they were. Asked are answers of a task far
behind the window, and beside it plain text. The costs are ranked; their values are not compared
with anything, so that no layer's own is a divisor.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.engine.mixer_matching import softmax_in
from memwrap.io.atomic_files import write_text
from memwrap.io.reading import read_json
from memwrap.memories.sizes import attending_layers
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.training.batches import IGNORED
from memwrap.training.finetune import build_data, build_model, is_first
from memwrap.training.held_out import task_rows
from memwrap.training.recipe import Recipe

CHOICE = "layer_choice"
Row = dict[str, Tensor]


def choose_layers(recipe: Recipe, stage: Recipe, folder: str) -> list[int]:
    """Measure, choose, and write a model to start the next stage from.

    Args:
        recipe: with `layer_choice`.
        stage: the next one; its `init_from` is what is measured (None: the untrained conversion).
        folder: for the model and the figures; those that are there are taken.

    Returns:
        The layers that are converted.

    Raises:
        ValueError: for a memory whose other layers have no softmax of their own, or more layers to
            keep than there are.
    """
    path = Path(folder) / f"{CHOICE}.json"
    if recipe.resume and path.is_file() and (Path(folder) / "config.json").is_file():
        return read_json(path)["converted"]
    section: Any = recipe.layer_choice
    torch.manual_seed(stage.trainer.seed)
    model, tokenizer = build_model(stage)
    if "other_window_size" not in model.memory_configs[0].to_dict():
        raise ValueError(
            f"`layer_choice`: layers that {model.memory_configs[0].name!r} leaves out have no "
            "softmax beyond its window; use a memory with `other_window_size`, or name `layers`."
        )
    data = build_data(stage, tokenizer, model.config.vocab_size)
    size = min(section.tokens, model.segment_size)
    asked = task_rows([section.task], tokenizer, size, size)  # type: ignore[arg-type]
    rows = [next(asked) for _ in range(section.rows)]
    held_out: Any = data.held_out or ()
    count = min(section.pieces, len(held_out))
    pieces = [{"input_ids": held_out[i]["input_ids"][:size]} for i in range(count)]
    figures = sweep(model, rows, pieces)
    converted, kept = kept_softmax(figures, section.keep)
    fewer = {**(stage.memory or {}), "layers": converted}
    smaller, _ = build_model(replace(stage, memory=fewer, init_from=None))
    if stage.init_from is not None:
        smaller.take_over(stage.init_from, whole=False)
    for layer in kept:
        _without_adapters(smaller, layer)
    if is_first():
        smaller.save_pretrained(folder)
        about = {"kept": kept, "converted": converted, "task": section.task, "tokens": size}
        about |= {"rows": len(rows), "pieces": len(pieces), "seed": stage.trainer.seed}
        write_text(path, json.dumps({**about, "sweep": figures}, indent=2) + "\n")
    return converted


def kept_softmax(figures: list[dict[str, Any]], count: int) -> tuple[list[int], list[int]]:
    """Choose the layers whose conversion makes answers least likely; of two alike, the one that
    costs more in plain text.

    Returns:
        Layers to convert, and `count` layers to keep.

    Raises:
        ValueError: if none were left to convert.
    """
    single = [row for row in figures if row["layer"] is not None]
    if count >= len(single):
        raise ValueError(
            f"`layer_choice.keep` is {count}; it must be below {len(single)}, the model's layers "
            "with attention."
        )
    ranked = sorted(single, key=lambda row: (-row["answer_nats"], -row["text_nats"], row["layer"]))
    kept = sorted(row["layer"] for row in ranked[:count])
    return sorted(row["layer"] for row in ranked[count:]), kept


@torch.no_grad()
def sweep(
    model: MemoryModelForCausalLM, rows: list[Row], pieces: list[Row]
) -> list[dict[str, Any]]:
    """Measure the base, each layer converted alone, and all of them.

    Args:
        model: every layer converted.
        rows: `input_ids`, and `labels` on answers, of at most a segment.
        pieces: `input_ids` of plain text, of at most a segment.

    Returns:
        Rows with `layer` (None for the base, and for all), `converted` (how many are), nats per
        token of answers and text, and the share of answers that are the likeliest, all tokens.
    """
    memory = next(m for m in model.memories.values() if m.claims.linearizes)
    layers = attending_layers(memory.config, memory.sizes)
    model.eval()
    trials: list[tuple[int | None, list[int]]] = [(None, []), *((n, [n]) for n in layers)]
    trials.append((None, layers))
    figures = []
    for layer, converted in tqdm(trials, desc="layers", unit="layer"):
        others = [n for n in range(len(model.parts.layers)) if n not in converted]
        with softmax_in(others, list(model.parts.layers)):
            answers = [_nats(model, row) for row in rows]
            texts = [_nats(model, piece)[0] for piece in pieces]
        figures.append({
            "layer": layer, "converted": len(converted),
            "answer_nats": sum(n for n, _ in answers) / len(answers),
            "answers_right": sum(right for _, right in answers) / len(answers),
            "text_nats": sum(texts) / max(1, len(texts)),
        })  # fmt: skip
    return figures


def _nats(model: MemoryModelForCausalLM, row: Row) -> tuple[float, bool]:
    """Compute a row's mean loss, and whether all its targets are the likeliest."""
    ids = row["input_ids"][None].to(model.device)
    labels = row.get("labels", row["input_ids"])[None].to(model.device)[:, 1:]
    logits = model(ids[:, :-1], use_cache=False).logits.float()
    wanted = labels != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[wanted], labels[wanted])
    return float(loss), bool((logits.argmax(-1) == labels)[wanted].all())


def _without_adapters(model: MemoryModelForCausalLM, layer: int) -> None:
    """Let a layer's adapters begin anew, adding nothing."""
    with torch.no_grad():
        for name, parameter in model.parts.layers[layer].named_parameters():
            if "lora_B" in name:
                parameter.zero_()


__all__ = ["CHOICE", "choose_layers", "kept_softmax", "sweep"]
