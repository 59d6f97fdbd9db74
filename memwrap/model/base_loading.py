"""Where the backbone of a saved model comes from, and which loading options reach it."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from memwrap.assets import asset
from memwrap.assets.places import find_model
from memwrap.backbones.auto_classes import auto_class
from memwrap.io.own_paths import is_own
from memwrap.io.reading import inside
from memwrap.model.configuration import is_foreign
from memwrap.model.limits import building
from memwrap.model.weight_files import CONFIG, SavedModel

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
"""They reach the saved model's repository and that of its base."""
# What transformers' own Auto classes add.
_INNER = ("_from_auto", "adapter_kwargs", "_commit_hash")
# Of a base: what is true wherever memwrap reads the files itself.
_TRUE_HERE: dict[str, tuple[Any, ...]] = {
    "use_safetensors": (None, True), "weights_only": (None, True),
    "trust_remote_code": (None, False), "code_revision": (None,),
    "low_cpu_mem_usage": (None, True, False), "ignore_mismatched_sizes": (None, False),
    "use_kernels": (None, False),
}  # fmt: skip
_CHOICES = ("attn_implementation", "experts_implementation")
_OF_A_WHOLE = {"dtype", "torch_dtype", "device_map", *_CHOICES}


def find_folder(name: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """Find the folder of a saved model: the name's own, a shipped one, or one from the Hub; of it
    the subfolder, if one is named.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the subfolder lies outside.
    """
    if subfolder:
        whole = find_folder(name, **hub)
        part = inside(whole, subfolder)
        if not part.is_dir():
            raise FileNotFoundError(f"There is no folder {subfolder} in {whole}.")
        return part
    place = find_model(name, **hub)
    return (
        place if isinstance(place, Path) else Path(huggingface_hub.snapshot_download(place, **hub))
    )


def base_place(config: Any, folder: Path) -> str | Path:
    """Find what the base of the model saved in `folder` is loaded by.

    Raises:
        ValueError: if it has no name, or is a folder elsewhere that somebody else wrote down.
    """
    name = config.base_model
    if not isinstance(name, str) or not name:
        raise ValueError(
            "The saved model does not name its base (it was wrapped in memory); give it: "
            "memwrap.load(folder, base)."
        )
    asset_folder = asset(name)
    if asset_folder is not None:
        return asset_folder
    if is_own(name, config.base_mark):
        return name
    if not os.path.isabs(name) and (folder / name).is_dir():
        return inside(folder, name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or Path(name).exists():
        raise ValueError(
            f"{folder / CONFIG} names {name[:100]!r} as its base, a path that you did not save "
            "there; give the base or its folder: memwrap.load(folder, base)."
        )
    return name


def load_base(saved: SavedModel, base: Any, options: dict[str, Any]) -> PreTrainedModel:
    """Load the backbone of a saved model: the one that is given, one rebuilt to be filled, or that
    of its recorded name.

    Args:
        saved: the model's files.
        base: a model, or a name or folder to load it from, or None.
        options: of `memwrap.load`.

    Raises:
        ValueError: for options that no loader here understands.
    """
    options = {name: value for name, value in options.items() if name not in _INNER}
    folder, config = saved.folder, saved.config
    if base is not None and not isinstance(base, (str, Path)):
        wrong = sorted(set(options) - set(HUB_OPTIONS) - _harmless(options))
        if wrong:
            raise ValueError(
                f"{wrong} go to the loading of the base, but a base was given; leave them out."
            )
        return base
    given = options.pop("dtype", None) or options.pop("torch_dtype", None)
    dtype = config.backbone.dtype if given in (None, "auto") else given
    trust, own_code = bool(options.get("trust_remote_code")), _needs_code(config)
    if own_code and not trust:
        raise ValueError(
            f"{folder} has a base of the type {config.backbone.model_type!r} with code of its own, "
            "not transformers': give memwrap.load(..., trust_remote_code=True) to run that of the "
            "base, or the base as a model: memwrap.load(folder, model)."
        )
    if base is None and config.base_included:
        _check_whole(options, folder)
        if own_code:
            config.backbone = _own_config(config, folder, options)
        chosen = {n: options[n] for n in _CHOICES if options.get(n) is not None}
        with building(saved.tensors, folder / CONFIG):
            return auto_class(config.backbone).from_config(
                copy.deepcopy(config.backbone), dtype=dtype, trust_remote_code=trust, **chosen
            )
    place = find_model(base_place(config, folder) if base is None else base, **options)
    kind = auto_class(config.backbone)
    if base is None and "quantization_config" not in options:
        options = options | _quantised_as_before(config.backbone, place, options)
    return kind.from_pretrained(place, dtype=dtype, **options)


def _quantised_as_before(config: Any, place: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Choose the quantisation that a base was loaded with, where its folder holds it without."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict):
        return {}
    base_config = AutoConfig.from_pretrained(place, **_hub(options))
    if getattr(base_config, "quantization_config", None) is not None:
        return {}
    return {"quantization_config": AutoQuantizationConfig.from_dict(dict(settings))}


def _hub(options: dict[str, Any]) -> dict[str, Any]:
    names = ("trust_remote_code", "code_revision", *HUB_OPTIONS)
    return {name: options[name] for name in names if name in options}


def _needs_code(config: Any) -> bool:
    """Tell whether the class of a saved model's base came with it. Where transformers has one for
    its type, too, that is another model, or no more than one that looks the same."""
    return is_foreign(config.backbone) or bool(config.base_code)


def _own_config(config: Any, folder: Path, options: dict[str, Any]) -> Any:
    """Read a backbone's config again by its own class, which comes with the base."""
    base_config = AutoConfig.from_pretrained(base_place(config, folder), **_hub(options))
    return type(base_config).from_dict(config.backbone.to_dict())


def options_in(config: Any, saved: Any, folder: Path) -> dict[str, Any]:
    """Collect the options of loading that a config, made of the saved one, carries: what
    transformers' Auto classes know of is put there.

    Raises:
        ValueError: for a setting that would change what was saved.
    """
    if config is None:
        return {}
    if type(config) is not type(saved):
        raise ValueError(
            f"`config` is a {type(config).__name__}; {folder} holds a model of memwrap. Leave it "
            "out, or give its base's config to the base's loading."
        )
    values, saved_values = ({**c.to_dict(), **_without(c)} for c in (config, saved))
    changed = sorted(
        k for k in values.keys() | saved_values.keys() if values.get(k) != saved_values.get(k)
    )
    if changed:
        raise ValueError(
            f"`{changed[0]}` cannot be changed as a saved memwrap model is loaded; load it, then "
            "set it at the model or its config."
        )
    options = {option: getattr(config, f"_{option}", None) for option in _CHOICES}
    return {option: value for option, value in options.items() if value is not None}


def _without(config: Any) -> dict[str, Any]:
    """Return what does not count in a comparison of configs, each as None."""
    backbone = {**config.backbone.to_dict(), "_name_or_path": None, "dtype": None}
    names = ("_name_or_path", "dtype", "torch_dtype", "_commit_hash", "transformers_version")
    return {**dict.fromkeys(names), "backbone": backbone}


def place_of(options: dict[str, Any]) -> Any:
    """Find the one device that `device_map` names, for a model that holds its base's weights."""
    wanted = options.get("device_map")
    place = next(iter(wanted.values()), None) if isinstance(wanted, dict) else wanted
    if place in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return place


def _harmless(options: dict[str, Any]) -> set[str]:
    """Name the options that say what is so anyway."""
    return {n for n, allowed in _TRUE_HERE.items() if n in options and options[n] in allowed}


def _check_whole(options: dict[str, Any], folder: Path) -> None:
    """Refuse options that loading a base by its name understands, and filling one from the saved
    model's own files does not."""
    trusted = {"trust_remote_code", "code_revision"}
    known = _OF_A_WHOLE | set(HUB_OPTIONS) | trusted | _harmless(options)
    refused = sorted(n for n, value in options.items() if n not in known and value is not None)
    wanted = options.get("device_map")
    places = set(wanted.values()) if isinstance(wanted, dict) else {wanted}
    if len(places) > 1 or "disk" in places:
        refused.append("device_map")
    if refused:
        raise ValueError(
            f"{folder} holds its base's weights, which are loaded onto one device: `{refused[0]}` "
            "does not go with it. Load the base yourself and give it: memwrap.load(folder, base)."
        )
