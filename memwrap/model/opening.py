"""Opening what a user names, a saved memory model or any model with a memory, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import AutoConfig, AutoTokenizer

from memwrap.assets import asset
from memwrap.assets.places import find_model
from memwrap.backbones.auto_classes import load_backbone
from memwrap.io.reading import inside, read_json
from memwrap.memories.registry import config_class
from memwrap.model.base_loading import base_place
from memwrap.model.cpu_dtype import quick_dtype
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.model.wrapping import load, wrap

_CONFIG = "config.json"
HINT = "give it a memory: --memory NAME, of `memwrap list`; infllm and window need no training"


def open_model(
    name: str | Path,
    memory: str | None = None,
    settings: dict[str, Any] | None = None,
    *,
    dtype: Any = None,
) -> MemoryModelForCausalLM:
    """Open a model on the best device, in evaluation mode.

    Args:
        name: a folder, a name such as `"smollm2"`, or a repo id on the Hub.
        memory: for a model without one: the memory to attach. None for a saved memwrap model.
        settings: fields of the memory's config.
        dtype: of the backbone; by default as saved, but for a model without memory float32 on a
            CPU where that is much quicker (`memwrap.model.cpu_dtype`).

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for a memory beside a model that has its own, none beside one that has not,
            and as `wrap` and `load`.
    """
    options: dict[str, Any] = {"dtype": dtype} if dtype else {}
    has_memory = is_memory_model(name)
    if has_memory and (memory or settings):
        raise ValueError(f"{name} has a memory of its own; leave the memory and its settings out.")
    if memory is None and not has_memory:
        raise ValueError(f"{name} is a model without memory; {HINT}.")
    if memory is None:
        model = load(name, **options)
        if not dtype:
            quick_dtype(model.parts.config, keep=True)
    else:
        config = config_class(memory).from_dict(settings or {})  # before anything is loaded
        place = find_model(name)
        quick = None if dtype else quick_dtype(AutoConfig.from_pretrained(place))
        options |= {"dtype": quick} if quick else {}
        model = wrap(load_backbone(place, **options), config).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return model


def is_memory_model(name: str | Path) -> bool:
    """Tell whether a saved model is memwrap's, from its config alone.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: for a folder without a model or a damaged config.
    """
    place = find_model(name)
    if isinstance(place, Path):
        path = place / _CONFIG
        if not path.is_file():
            raise ValueError(f"{place} holds no model: {_CONFIG} is missing.")
    else:
        try:
            path = Path(huggingface_hub.hf_hub_download(place, _CONFIG))
        except OSError as error:
            raise FileNotFoundError(f"The Hub does not give {_CONFIG} of {name}.") from error
    about = read_json(inside(path.parent, path.name))
    return isinstance(about, dict) and about.get("model_type") == "memwrap"


def open_tokenizer(name: str | Path, model: Any) -> Any:
    """Load the tokenizer that is saved with a model, else its base's.

    Raises:
        ValueError: if there is none, or its files, or the base's, are links to elsewhere.
    """
    for place in _places(name, model):
        folder = Path(place)
        for pattern in ("*", "additional_chat_templates/*"):
            for file in folder.glob(pattern):
                if file.suffix in (".json", ".jinja", ".model", ".txt"):
                    inside(folder, str(file.relative_to(folder)))
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
        except Exception as error:  # of the tokenizers package, of every kind
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"The tokenizer in {place} is damaged: {reason}") from error
    raise ValueError(f"{name} has no tokenizer; save it there: tokenizer.save_pretrained(folder).")


def _places(name: str | Path, model: Any) -> Iterator[str | Path]:
    """Give the places where a model's tokenizer may be: beside it, and beside its base."""
    yield asset(name) or name
    base = model.config.base_model
    if base and is_memory_model(name):  # a file says what the base is
        yield base_place(model.config, asset(name) or Path(name))
    elif base:
        yield asset(base) or base


__all__ = ["HINT", "is_memory_model", "open_model", "open_tokenizer"]
