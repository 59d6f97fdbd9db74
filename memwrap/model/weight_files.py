"""Files of a saved model: writing, reading and checking them, without adapters and bases."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from memwrap.io.checksums import check_sums, checksums, head_digest
from memwrap.io.reading import inside, read_json, read_text
from memwrap.io.whole_folders import settle
from memwrap.state.file_check import check_finite

WEIGHTS, CONFIG, GENERATION = "model.safetensors", "config.json", "generation_config.json"
OWN_FILES = "model*.safetensors*"
SEAL, SEAL_FORMAT = "sealed", 1
_MOST_COUNT, _MOST_NUMBER = 2**20, 2**53
# Configs make lists of so many entries, and more, before anything can be compared with the weights.
_LAYERS, _MOST_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1024


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


# Writing


def write_model(
    folder: Path,
    tensors: dict[str, Tensor],
    config: Any,
    generation_config: Any,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write weights and configs of a model into a new folder; `seal` it when all is there.

    Raises:
        ValueError: for weights that are not finite.
    """
    check_finite(tensors, "The model", "it is not saved. Go back to an earlier checkpoint.")
    names = {id(v): k for k, v in reversed(tensors.items())}
    unique = {k: v.contiguous() for k, v in tensors.items() if names[id(v)] == k}
    if unique:
        plain = untied(unique)
        sums = checksums(plain)
        huggingface_hub.save_torch_state_dict(
            plain, folder, metadata=sums, max_shard_size=max_shard_size
        )
    else:  # a memory without parameters
        save_file({}, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)


def seal(folder: Path, marks: dict[str, str] | None = None) -> None:
    """Note in config.json what it says and what the files beside it are, so that a mixture of two
    saves, or a file that changed, is found at loading.

    Args:
        folder: of `write_model`.
        marks: what memories wrote beside it (`Memory.save_files`).
    """
    values = read_json(folder / CONFIG)
    values.pop(SEAL, None)
    files = [*folder.glob(OWN_FILES), folder / GENERATION]
    about = {
        "format": SEAL_FORMAT, "settings": _settings(values), "marks": marks or {},
        "files": {path.name: _digest(path) for path in sorted(files) if path.is_file()},
    }  # fmt: skip
    text = json.dumps({**values, SEAL: about}, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _settings(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        return head_digest(path)
    return hashlib.sha256(read_text(path, 2**26).encode()).hexdigest()[:32]


# Reading


class SavedModel:
    """The contents of a saved model's folder, read at once and only if its parts belong together.

    Attributes:
        folder: the folder.
        config: its config.
        tensors: its weights by name.
        generation_config: its generation config, or None.
        marks: what memories wrote beside it; None if the folder has no seal.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for damaged and foreign files, and for a folder whose parts are not of one save.
    """

    def __init__(self, model_class: Any, folder: Path) -> None:
        settle(folder)
        self.folder = folder
        for attempt in range(3):
            values = _values(folder)
            try:
                self._read(model_class, values)
                return
            except (ValueError, FileNotFoundError):
                # Another process may have saved there in between.
                if attempt == 2 or values == _values(folder):
                    raise

    def _read(self, model_class: Any, values: dict[str, Any]) -> None:
        path = self.folder / CONFIG
        sealed = values.get(SEAL)
        self.config = _config(model_class, {k: v for k, v in values.items() if k != SEAL}, path)
        if sealed is None:
            self.marks = None
            names = _weight_names(self.folder)
            generation = inside(self.folder, GENERATION)
        else:
            files, self.marks = _checked_seal(values, self.folder)
            names = [name for name in files if name.endswith(".safetensors")]
            generation = self.folder / (GENERATION if GENERATION in files else "")
        self.tensors = read_weights(self.folder, names)
        self.generation_config = None
        if generation.is_file():
            try:
                self.generation_config = GenerationConfig.from_dict(read_json(generation))
            except Exception as error:  # transformers' own checks, of every kind
                raise ValueError(f"{generation} is damaged: {error}") from error


def _values(folder: Path) -> dict[str, Any]:
    path = inside(folder, CONFIG)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; it is not a saved memwrap model.")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type") != "memwrap":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ValueError(
            f"{folder} holds a {kind!r} model, not a memwrap one; use memwrap.wrap(model, ...)."
        )
    return values


def _config(model_class: Any, values: dict[str, Any], path: Path) -> Any:
    _check_numbers(values, path)
    try:
        config = model_class.config_class.from_dict(_with_floats(values))
    except Exception as error:  # transformers' and each family's own checks, of every kind
        raise ValueError(f"{path} does not describe a memwrap model: {error}") from error
    for name in ("memories", "backbone"):
        if not getattr(config, name):
            raise ValueError(f"{path} does not describe a memwrap model: it names no {name}.")
    return config


def _with_floats(values: Any) -> Any:
    """Read back the floats that JSON lacks, which transformers writes as `{"__float__": name}`."""
    if isinstance(values, list):
        return [_with_floats(value) for value in values]
    if not isinstance(values, dict):
        return values
    if values.keys() == {"__float__"}:
        return float(values["__float__"])
    return {key: _with_floats(value) for key, value in values.items()}


def _check_numbers(values: Any, path: Path) -> None:
    """Refuse what no model has, before a config makes lists of it; and a choice of code that is
    made when a model is loaded."""
    if isinstance(values, list):
        for value in values:
            _check_numbers(value, path)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and value is not None:
            raise ValueError(f"{path} chooses `{key}`; give it to memwrap.load instead.")
        if isinstance(value, int):
            most = _MOST_COUNT if key.startswith(("num_", "n_")) else _MOST_NUMBER
            if abs(value) > most or (key in _LAYERS and not 0 < value <= _MOST_LAYERS):
                raise ValueError(f"{path} does not describe a memwrap model: {key} is {value:.2g}.")
        _check_numbers(value, path)


def _checked_seal(values: dict[str, Any], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Check the seal: give names and digests of the files that belong together, and the memories'
    marks."""
    path, about = folder / CONFIG, values[SEAL]
    form = about.get("format") if isinstance(about, dict) else None
    if form != SEAL_FORMAT:
        raise ValueError(f"{path} has the format {form!r}; this memwrap reads {SEAL_FORMAT}.")
    files, marks = about.get("files"), about.get("marks")
    if not isinstance(files, dict) or not isinstance(marks, dict):
        raise ValueError(f'{path} is damaged: its "{SEAL}" cannot be read.')
    advice = f'save it again, or take "{SEAL}" out of config.json if that is meant'
    if about.get("settings") != _settings({k: v for k, v in values.items() if k != SEAL}):
        raise ValueError(f"{path} was changed after it was saved, or is damaged; {advice}.")
    for name, digest in files.items():
        file = inside(folder, name)
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; the saved model is not whole.")
        if _digest(file) != digest:
            raise ValueError(f"{file} is damaged, or not of one save with config.json; {advice}.")
    return files, marks


def _weight_names(folder: Path) -> list[str]:
    index = inside(folder, f"{WEIGHTS}.index.json")
    if not index.is_file():
        return [WEIGHTS]
    places = read_json(index)
    names = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} is damaged: it has no map of names to files.")
    return sorted(set(names.values()))


def read_weights(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Read all tensors of a saved model's files, by name."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = inside(folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; the saved model is not whole.")
        try:
            part = load_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
        except (SafetensorError, OSError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        check_sums(part, metadata, path)
        check_finite(part, str(path), "it was saved by a training that had failed, or is damaged.")
        for key in part.keys() & tensors.keys():
            raise ValueError(f"{path} holds {key}, which another of the model's files holds too.")
        tensors |= part
    return tensors


def check_names(model: Any, tensors: dict[str, Tensor], needed: set[str], folder: Path) -> None:
    """Refuse weights that are not those of the model: all that are `needed`, and no others."""
    weights = model.state_dict(keep_vars=True)
    # Of tied ones the file has one name.
    filled = {id(weights[k]) for k in tensors.keys() & weights.keys()}
    missing = sorted(k for k in needed - tensors.keys() if id(weights[k]) not in filled)
    foreign = sorted(tensors.keys() - weights.keys())
    if missing or foreign:
        fault = f"lacks {missing[0]}" if missing else f"holds {foreign[0]}, which the model has not"
        raise ValueError(f"{folder / WEIGHTS} does not fit its config: it {fault}.")


def put_weights(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill a model with the tensors of its folder, all or none of them."""
    weights = model.state_dict()
    for key, value in tensors.items():
        if value.shape != weights[key].shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {key} has shape {tuple(value.shape)}, the model needs "
                f"{tuple(weights[key].shape)}."
            )
        if value.is_floating_point() != weights[key].is_floating_point() or value.is_complex():
            raise ValueError(
                f"{folder / WEIGHTS}: {key} has dtype {value.dtype}, the model needs "
                f"{weights[key].dtype}."
            )
        if value.numel() and value.is_floating_point() and value.element_size() > 1:
            ends = torch.stack(value.aminmax()).to(weights[key].dtype)
            if not bool(ends.isfinite().all()):
                raise ValueError(
                    f"{folder / WEIGHTS}: {key} holds numbers that {ends.dtype} cannot; load the "
                    "model in a wider dtype."
                )
    _check_tied(weights, tensors, folder)
    model.load_state_dict(tensors, strict=False)
    # PEFT's trainable tokens tie their own wrappers; transformers would look for a parameter there.
    if isinstance(model.backbone.get_input_embeddings().weight, nn.Parameter):
        model.backbone.tie_weights()


def _check_tied(weights: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse weights that the config ties, and of which the file holds two."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for key, value in tensors.items():
        place = weights[key].data_ptr(), tuple(value.shape)
        other = first.setdefault(place, key)
        if place[0] and other != key and not torch.equal(value, tensors[other]):
            raise ValueError(
                f"{folder / CONFIG} says that {other} and {key} are one weight; the file beside it "
                "holds two. Set `tie_word_embeddings` as it was."
            )


def untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep tied weights once: the first name keeps the storage, `tie_weights` restores the
    others."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    result = {}
    for key, value in tensors.items():
        place = (value.data_ptr(), tuple(value.shape))
        if value.numel() and place in seen:
            continue
        seen.add(place)
        result[key] = value.detach()
    return result
