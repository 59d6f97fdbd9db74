"""AHN as its authors publish it: the recurrences' tensors beside a config, put on a base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from memwrap.assets import asset
from memwrap.backbones.auto_classes import load_backbone
from memwrap.io.reading import inside, read_json
from memwrap.memories.ahn import AHNConfig, LayerAHN
from memwrap.model.base_loading import find_folder
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.model.wrapping import unwrap, wrap
from memwrap.state.file_check import check_finite

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMS = {"GatedDeltaNet": "gated_delta", "DeltaNet": "delta", "Mamba2": "gated"}
"""Forms of `AHNConfig` by their published names."""
_DELTA = {
    "write": "b_proj.weight", "forget": "a_proj.weight", "rate": "A_log", "bias": "dt_bias",
    "read": "g_proj.weight", "norm": "o_norm.weight", "out": "o_proj.weight",
}  # fmt: skip
_GATED = {
    "write": "dt_proj.weight", "rate": "A_log", "bias": "dt_bias", "read": "g_proj.weight",
    "read_bias": "g_proj.bias", "norm": "norm.weight", "out": "o_proj.weight",
}  # fmt: skip
_ADDED = "dt_proj.bias"  # the second of two biases that are only ever added
_UNUSED = "D"  # by nothing in the published code
# What there is in the public code and not here; off in all published checkpoints.
_OFF = ("use_ahn_router", "use_q_proj", "fa_layer_ids")
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
_NAME = re.compile(r"model\.layers\.(\d{1,4})\.ahn\.fn\.([\w.]+)")


def load_ahn(
    folder: str | Path, base: PreTrainedModel | str | Path, **settings: Any
) -> MemoryModelForCausalLM:
    """Put a published AHN checkpoint on its base.

    Nothing of the folder runs: its config and its tensors are read, and must fit the base exactly.

    Args:
        folder: a folder or a repo id on the Hub, with `config.json` and `model.safetensors`.
        base: the model that it was trained on, or its name or folder.
        settings: fields of `AHNConfig` instead of the folder's. It says `form`, `window_size` and
            mostly not `num_sinks`: 0 then, as the public code has it (its evaluations: 128).

    Returns:
        The model in evaluation mode; `save_pretrained` makes it one of memwrap's.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the files are damaged, no AHN checkpoint, of another base, or use what is
            not built here (the router, a projection of queries, layers without AHN).
    """
    path = find_folder(folder)
    about = read_json(inside(path, CONFIG))
    config = AHNConfig.from_dict({**_settings(about, path), **settings})
    layers = _tensors(path)
    if not isinstance(base, PreTrainedModel):
        base = load_backbone(asset(str(base)) or base)
    for name in _SHAPE:
        if about.get(name) != getattr(base.config, name, None):
            raise ValueError(
                f"{path} belongs to a base with {name} {about.get(name)!r}; the given one has "
                f"{getattr(base.config, name, None)!r}. Give the base it was trained on."
            )
    model = wrap(base, config)
    networks: Any = model.memories[config.name].networks
    try:
        if networks.keys() != layers.keys():
            raise ValueError(
                f"{path} has a recurrence in layers {sorted(map(int, layers))}, the model in "
                f"{sorted(map(int, networks))}; they must be the same (setting `layers`)."
            )
        for name, network in networks.items():
            fill(network, layers[name], f"{path / WEIGHTS}, layer {name}")
    except ValueError:
        unwrap(model)  # the base is the caller's
        raise
    return model.eval()


def _settings(about: Any, path: Path) -> dict[str, Any]:
    """Read the settings of a published config."""
    about = about if isinstance(about, dict) else {}
    form = about.get("_ahn_implementation")
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(
            f"{path} is no AHN checkpoint: `_ahn_implementation` is {form!r}; known: "
            f"{', '.join(FORMS)}."
        )
    used = [name for name in _OFF if about.get(name)]
    if used:
        raise ValueError(
            f"{path} has `{used[0]}` = {about[used[0]]!r}, which memwrap's ahn does not have; only "
            "checkpoints without it can be loaded."
        )
    if not about.get("sliding_window"):
        raise ValueError(f"{path / CONFIG} has no `sliding_window`; AHN is read beside a window.")
    return {
        "form": FORMS[form],
        "window_size": about["sliding_window"],
        "num_sinks": about.get("num_attn_sinks") or 0,
    }


def _tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read the tensors by layer, each by what it is called in it."""
    file = inside(path, WEIGHTS)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing (other formats are not read).")
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    check_finite(tensors, str(file), "it is not read.")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise ValueError(
                f"{file} holds {name[:100]!r}, which is no part of a recurrence; checkpoints with "
                "weights of the base are not read."
            )
        layers.setdefault(str(int(parts[1])), {})[parts[2]] = tensor
    return layers


@torch.no_grad()
def fill(layer: LayerAHN, tensors: dict[str, Tensor], source: str) -> None:
    """Put the published tensors of one layer into it.

    Args:
        layer: of the same form.
        tensors: by their names behind `ahn.fn.`.
        source: where they come from, for errors.

    Raises:
        ValueError: for a tensor that is missing, unknown or of another shape.
    """
    names = names_of(layer)
    wanted = {names[name]: p for name, p in layer.named_parameters()}
    shapes = {name: p.shape for name, p in wanted.items()}
    if layer.read_bias is not None:
        shapes[_ADDED] = layer.bias.shape
    missing, unknown = shapes.keys() - tensors, tensors.keys() - shapes.keys() - {_UNUSED}
    if missing or unknown:
        fault, wrong = ("lacks", missing) if missing else ("has the unknown", unknown)
        raise ValueError(f"{source}: it {fault} {min(wrong)[:100]!r}; its form has {[*shapes]}.")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source}: {name!r} is of shape {tuple(tensors[name].shape)}, the base needs "
                f"{tuple(shape)}. Give the base it was trained on."
            )
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])
    if _ADDED in shapes:
        layer.bias.add_(tensors[_ADDED].to(layer.bias))


def names_of(layer: LayerAHN) -> dict[str, str]:
    """Tell what the parameters of a layer are called in a published checkpoint."""
    return _DELTA if layer.read_bias is None else _GATED


__all__ = ["FORMS", "fill", "load_ahn", "names_of"]
