"""Whether a base has the weights of the files that it is named by."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from memwrap.backbones.offloaded import loaded_parameters
from memwrap.io.reading import read_json
from memwrap.model.adapter_switches import adapter_keys

_NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_WHOLE = 2**22  # tensors of so many numbers are compared whole, of larger ones some rows
_ROWS = 16
_NOISE = 1e-3  # of the numbers' deviation
_PLAIN = ("F64", "F32", "F16", "BF16")
# What PEFT puts into names; adapters of several tensors of one module stand in each other.
_WRAPPERS = re.compile(r"((\.token_adapter)?\.base_layer|\.original_module)+(?=\.)")


def plain_name(name: str) -> str:
    """Name a backbone parameter as it is without adapters."""
    return _WRAPPERS.sub("", name)


def quantised_kind(model: nn.Module) -> str:
    """Name the kind of quantised tensors that a model's weights are; empty for plain ones."""
    for parameter in model.parameters():
        data = parameter.data
        if hasattr(data, "__tensor_flatten__") and not hasattr(data, "full_tensor"):
            return type(data).__name__
    return ""


def differs_from_files(model: PreTrainedModel) -> bool:
    """Tell whether a base's weights are others than those of the safetensors files that its config
    names, as after training, or after adapters were merged into it. What cannot be compared (files
    that are not on this machine, other names or shapes, quantised weights) does not differ."""
    place = getattr(model.config, "_name_or_path", "") or ""
    if not place or getattr(model.config, "quantization_config", None) is not None:
        return False
    added = adapter_keys(model)
    kept = {plain_name(k): p for k, p in loaded_parameters(model) if k not in added}
    revision = getattr(model.config, "_commit_hash", None)
    return any(_differs(kept, file) for file in _files(place, revision))


def _files(place: str, revision: str | None) -> Iterator[Path]:
    """Give the files of weights that are here."""
    single, index = (_file(place, name, revision) for name in _NAMES)
    if single is not None:
        yield single
    elif index is not None:
        parts = [_file(place, name, revision) for name in _shards(index)]
        yield from (file for file in parts if file is not None)


def _shards(index: Path) -> list[str]:
    """Name the files of an index that lie beside it; none of one that cannot be read."""
    try:
        names = {*read_json(index)["weight_map"].values()}
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return []
    return sorted(name for name in names if isinstance(name, str) and Path(name).name == name)


def _file(place: str, name: str, revision: str | None) -> Path | None:
    if os.path.isdir(place):
        path = Path(place) / name
        return path if path.is_file() else None
    try:
        got: Any = huggingface_hub.try_to_load_from_cache(place, name, revision=revision)
    except ValueError:  # the name is none of a repository
        return None
    return Path(got) if isinstance(got, str) else None


def _differs(kept: dict[str, Tensor], file: Path) -> bool:
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError):  # it is damaged: nothing to compare with
        return False
    with opened as tensors:
        for name in tensors.keys():  # noqa: SIM118
            weight = kept.get(name)
            if weight is None or type(weight.data) is not Tensor or not weight.dim():
                continue
            saved, weight = tensors.get_slice(name), weight.detach()
            shape, plain = saved.get_shape(), saved.get_dtype() in _PLAIN
            if not shape or shape[1:] != list(weight.shape[1:]):
                continue
            if not plain or not weight.is_floating_point():
                continue
            if not (_alike(weight, saved) if shape[0] == len(weight) else _grown(weight, shape[0])):
                return True
    return False


def _grown(weight: Tensor, rows: int) -> bool:
    """Tell whether a table has `rows` and behind them their mean, as `vocabulary.extend` adds it;
    transformers adds a little noise."""
    if len(weight) < rows:
        return False
    before = weight[:rows].float()
    return bool(((weight[rows:] - before.mean(0)).abs() <= _NOISE * before.std()).all())


def _alike(weight: Tensor, saved: Any) -> bool:
    if weight.numel() <= _WHOLE:
        return torch.equal(weight.cpu(), saved[:].to(weight.dtype))
    rows = range(0, len(weight), max(1, len(weight) // _ROWS))
    return all(torch.equal(weight[n].cpu(), saved[n].to(weight.dtype)) for n in rows)
