"""Adapters that PEFT saved: their folder is read as any other file of somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memwrap.io.reading import inside, read_json
from memwrap.model.adapter_configs import adapter_of, is_pattern
from memwrap.model.adapter_switches import begins_by_changing
from memwrap.state.file_check import check_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OUTER = "base_model.model."  # what a PeftModel puts in front of names


def read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Read the config and the weights, by their names in the backbone, of a folder of PEFT's.

    Patterns for the modules' names are not matched: the weights say which modules there are.

    Raises:
        FileNotFoundError: if a file is missing (pickled weights are not read).
        ValueError: for damaged files, links to elsewhere, an adapter that PEFT does not know, or
            one that changed the base's weights as it began.
    """
    path = inside(folder, WEIGHTS)
    values = read_json(inside(folder, CONFIG))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; an adapter's weights are read from it alone.")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    check_finite(weights, str(path), "it was saved by a training that had failed, or is damaged.")
    for key, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"{path} is damaged: {key[:80]} has dtype {value.dtype}.")
    weights = {key.removeprefix(_OUTER): value for key, value in weights.items()}
    try:
        if isinstance(values, dict) and is_pattern(values.get("target_modules")):
            values = _with_names(values, weights)
        config = adapter_of(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if begins_by_changing(values.get("init_lora_weights", True)):
        raise ValueError(
            f"{folder / CONFIG}: the adapter began by changing the base's weights "
            f"(init_lora_weights={values['init_lora_weights']!r}); convert it to plain LoRA with "
            "PEFT (path_initial_model_for_weight_conversion), or merge it."
        )
    return config, weights


def _with_names(values: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """Put the names of modules that have weights in the place of a pattern for them."""
    kind: Any = str(values.get("peft_type"))
    head = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind, "lora_")
    names = {key.partition(f".{head}")[0] for key in weights if f".{head}" in key}
    left_out = dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform"))
    return {**values, "target_modules": sorted(names), **left_out}
