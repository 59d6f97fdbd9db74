"""Slots as a prefix that PEFT trains (cartridges, prefix tuning), in and out."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memwrap.backbones.rotary import rotate
from memwrap.io.reading import inside, read_json
from memwrap.io.whole_folders import rewriting
from memwrap.memories.parts.compacting import Compacts
from memwrap.memories.parts.slots import Rows, clamped
from memwrap.state.file_check import check_finite
from memwrap.state.memory_state import MemoryState

CONFIG, WEIGHTS, NAME = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
KINDS = ("CARTRIDGE", "PREFIX_TUNING")


@torch.no_grad()
def load_prefix(model: Any, name: str, memory: Compacts, folder: Path) -> MemoryState:
    """Make a state of one row of a PEFT folder; see `CompactionMixin.load_prefix`."""
    layers, heads, width = _shape(model, memory)
    about = read_json(inside(folder, CONFIG))
    about = about if isinstance(about, dict) else {}
    kind, number = about.get("peft_type"), about.get("num_virtual_tokens")
    if kind not in KINDS:
        raise ValueError(f"{folder} holds an adapter of type {kind!r}; a prefix is {KINDS}.")
    if not inside(folder, WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS} is missing (other formats are not read).")
    try:
        given = load_file(folder / WEIGHTS).get(NAME)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    size = 2 * len(layers) * heads * width
    if given is None or given.dim() != 2 or not len(given) or given.shape[1] != size:
        got = "missing" if given is None else f"of shape {tuple(given.shape)}"
        raise ValueError(
            f"{folder / WEIGHTS}: {NAME!r} is {got}; this model needs (tokens, {size}): keys and "
            f"values of {len(layers)} layers with {heads} KV heads of {width} channels."
        )
    if number is not None and number != len(given):
        raise ValueError(
            f"{folder} is damaged: its config has {str(number)[:20]} tokens, its weights "
            f"{len(given)}. Save the prefix again."
        )
    if not given.is_floating_point():
        raise ValueError(f"{folder / WEIGHTS}: {NAME!r} has dtype {given.dtype}; floats are read.")
    state = model.new_state(1)
    dtype, count = model.parts.embedding_weight.dtype, len(given)
    given = given.to(dtype)
    check_finite({NAME: given}, f"{folder / WEIGHTS}, read in {dtype},", "it is not read.")
    rows = given.to(model.device, dtype).view(count, len(layers), 2, heads, width)
    place = torch.arange(count, device=model.device)[None]
    trees = state.memories[name]["layers"]
    for number, layer in enumerate(layers):
        key, value = (rows[:, number, n].transpose(0, 1)[None] for n in (0, 1))
        angles = model.parts.rotary.angles(place, layer, key)
        key = rotate(key, angles.inverse() if angles else None)
        made = Rows.plain(key, value, place - count, torch.ones_like(place, dtype=torch.bool))
        trees[str(layer)] = memory.with_rows(layer, trees[str(layer)], made)
    state.tokens_seen += count
    state.segments += 1
    state.columns, state.ids_hash = count, None
    state.weights = model.fingerprint()
    return state


@torch.no_grad()
def save_prefix(
    model: Any, name: str, memory: Compacts, state: MemoryState, folder: Path, kind: str
) -> None:
    """Write the rows of a state as a PEFT folder; see `CompactionMixin.save_prefix`."""
    if kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}; a prefix is {KINDS}.")
    layers, heads, width = _shape(model, memory)
    if state.batch_size != 1:
        raise ValueError(
            f"The state has {state.batch_size} rows; a prefix is one text's (state.select)."
        )
    trees = model.close_segment(state).memories[name]["layers"]
    layer_rows = {layer: memory.rows_of(layer, trees[str(layer)]) for layer in layers}
    counts = {int(n) for rows in layer_rows.values() for n in rows.valid.sum(-1).flatten()}
    if len(counts) > 1 or counts == {0}:
        raise ValueError(
            f"Heads hold {min(counts)} to {max(counts)} rows; PEFT needs as many in each, at "
            "least one. Read a text, and compact without `budgets`."
        )
    most = max(float(rows.bias.abs().max()) for rows in layer_rows.values())
    if most > 0:
        raise ValueError(
            f"Slots have biases (up to {most:.2f}), which a prefix of PEFT cannot hold and no key "
            "can stand for; compact the document by a model with `bias_bound=0`."
        )
    count = counts.pop()
    parts = [part for layer in layers for part in _cached(model, memory, layer, layer_rows[layer])]
    tensor = torch.stack(parts).permute(2, 0, 1, 3).reshape(count, -1).contiguous()
    about = _about(model, memory, (count, len(layers), heads, width), kind)
    with rewriting(folder) as new:
        save_file({NAME: tensor.cpu()}, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(about, indent=2), encoding="utf-8")


def _cached(model: Any, memory: Compacts, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """Give keys and values `(Hkv, N, D)` as a cache holds them when the next token stands at N."""
    heads, count = rows.key.shape[1:3]
    place = count + clamped(rows.place, memory.config.max_distance)
    angles = model.parts.rotary.angles(place.flatten(1), layer, rows.key)
    key = rotate(rows.key, angles and angles.of_heads(place.view(1, heads, count)))
    return key[0], rows.value[0]


def _about(
    model: Any, memory: Compacts, shape: tuple[int, int, int, int], kind: str
) -> dict[str, Any]:
    """Make the config by which PEFT finds a prefix of this shape again."""
    count, layers, heads, width = shape
    fields: dict[str, Any] = {"num_frozen_tokens": min(count, max(1, memory.config.num_sinks))}
    if kind == "PREFIX_TUNING":
        fields = {"encoder_hidden_size": None, "prefix_projection": False}
    return {
        "peft_type": kind, "task_type": "CAUSAL_LM", "peft_version": version("peft"),
        "base_model_name_or_path": getattr(model.backbone.config, "name_or_path", None) or None,
        "revision": None, "auto_mapping": None, "modules_to_save": None, "inference_mode": True,
        "num_virtual_tokens": count, "num_layers": layers, "num_attention_heads": heads,
        "token_dim": heads * width, "num_transformer_submodules": 1, **fields,
    }  # fmt: skip


def _shape(model: Any, memory: Compacts) -> tuple[list[int], int, int]:
    """Find the layers, KV heads and channels of a prefix.

    Raises:
        ValueError: where PEFT's form has no room for what the model needs.
    """
    sizes = memory.sizes.attention
    layers = sorted(sizes)
    shapes = {(d.num_kv_heads, d.key_dim, d.value_dim) for d in sizes.values()}
    if len(model.memories) > 1 or model.parts.recurrent:
        raise ValueError("A prefix is all that remembers; this model has more than 'compact'.")
    if model.parts.max_positions is not None:
        raise ValueError(
            "The backbone has a table of learned positions: keys of a prefix cannot be moved in it."
        )
    if list(memory.chosen) != layers or any(d.window is not None for d in sizes.values()):
        raise ValueError(
            "A prefix is seen in every layer; here some have no slots (`layers`, or a window of "
            "their own)."
        )
    heads, key, value = next(iter(shapes))
    if len(shapes) > 1 or key != value:
        raise ValueError(
            f"A prefix needs as many KV heads and channels in every layer, for keys and values "
            f"alike; here they are {sorted(shapes)}."
        )
    return layers, heads, key
