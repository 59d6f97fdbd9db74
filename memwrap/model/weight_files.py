"""Files of a saved model: reading and checking them, without adapters and without a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from memwrap.io.checksums import check_sums

WEIGHTS = "model.safetensors"


def check_shape(config: Any, base: PreTrainedModel, folder: Path) -> None:
    """Refuse a base of another shape than the one that was saved with the memory."""
    if not isinstance(base, PreTrainedModel):
        return  # the backbone room says what is wrong with it
    want, have = (c.get_text_config(decoder=True) for c in (config.backbone, base.config))
    for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        needed, got = getattr(want, name, None), getattr(have, name, None)
        if needed != got:
            raise ValueError(
                f"The memory in {folder.name} belongs to a base with {name} {needed!r}; the given "
                f"one has {got!r}. Give the base it was trained on."
            )


def read_config(cls: Any, folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; it is not a saved memwrap model.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "memwrap":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(
            f"{folder} holds a {kind!r} model, not a memwrap one; use memwrap.wrap(model, ...)."
        )
    try:
        config = cls.config_class.from_dict(values)
    except Exception as error:  # transformers' and each family's own checks, of every kind
        raise ValueError(f"{path} does not describe a memwrap model: {error}") from error
    for name in ("memories", "backbone"):
        if not getattr(config, name):
            raise ValueError(f"{path} does not describe a memwrap model: it names no {name}.")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a saved model, by name."""
    index = folder / f"{WEIGHTS}.index.json"
    names = [WEIGHTS]
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; the saved model is not whole.")
        try:
            own = load_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        check_sums(own, metadata, path)
        tensors |= own
    return tensors


def put_weights(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    for key, value in tensors.items():
        if value.shape != shapes[key]:
            raise ValueError(
                f"{folder / WEIGHTS}: {key} has shape {tuple(value.shape)}, the model needs "
                f"{tuple(shapes[key])}."
            )
    model.load_state_dict(tensors, strict=False)
    # PEFT's trainable tokens tie their own wrappers; transformers would look for a parameter there.
    if isinstance(model.backbone.get_input_embeddings().weight, nn.Parameter):
        model.backbone.tie_weights()


def untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once: the first name keeps the storage, `tie_weights` restores the others."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    result = {}
    for key, value in tensors.items():
        place = (value.data_ptr(), tuple(value.shape))
        if value.numel() and place in seen:
            continue
        seen.add(place)
        result[key] = value.detach()
    return result
