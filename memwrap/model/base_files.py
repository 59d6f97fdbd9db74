"""Whether a base has the weights of the files that it is named by."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from memwrap.backbones.offloaded import loaded_parameters
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
        names = json.loads(index.read_text())["weight_map"].values()
        found = [_file(place, name, revision) for name in sorted(set(names))]
        yield from (file for file in found if file is not None)


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
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            own = kept.get(name)
            if own is None or type(own.data) is not Tensor or not own.is_floating_point():
                continue
            saved = tensors.get_slice(name)
            rows, *width = saved.get_shape() or [1]
            if saved.get_dtype() not in _PLAIN or width != list(own.shape[1:]):
                continue
            same = rows == (len(own) if own.dim() else 1)
            if not (_alike(own.detach(), saved) if same else _grown(own.detach(), rows)):
                return True
    return False


def _grown(own: Tensor, rows: int) -> bool:
    """Tell whether a table has `rows` and behind them their mean, as `vocabulary.extend` adds it;
    transformers adds a little noise."""
    if len(own) < rows:
        return False
    before = own[:rows].float()
    return bool(((own[rows:] - before.mean(0)).abs() <= _NOISE * before.std()).all())


def _alike(own: Tensor, saved: Any) -> bool:
    if own.dim() == 0 or own.numel() <= _WHOLE:
        return torch.equal(own.cpu(), saved[:].to(own.dtype))
    step = max(1, len(own) // _ROWS)
    return all(
        torch.equal(own[row].cpu(), saved[row].to(own.dtype)) for row in range(0, len(own), step)
    )
