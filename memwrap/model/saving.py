"""Saving what was trained (memories, adapters, a changed backbone), and loading it again."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from memwrap.assets import asset
from memwrap.backbones.offloaded import loaded_parameters
from memwrap.backbones.vocabulary import extend
from memwrap.io.atomic_files import default_mode
from memwrap.io.checksums import checksums
from memwrap.io.fingerprints import fingerprint
from memwrap.memories.registry import config_class
from memwrap.model.weight_files import (
    WEIGHTS,
    check_shape,
    put_weights,
    read_config,
    read_weights,
    untied,
)

VERSION = "0.1.0"
# What PEFT puts into names; adapters of several tensors of one module stand in each other.
_WRAPPERS = re.compile(r"((\.token_adapter)?\.base_layer|\.original_module)+(?=\.)")


def plain_name(name: str) -> str:
    """A backbone parameter's name as it is without adapters."""
    return _WRAPPERS.sub("", name)


def adapter_keys(backbone: PreTrainedModel) -> set[str]:
    """Names of the tensors that PEFT put into the backbone."""
    keys: set[str] = set()
    for name, module in backbone.named_modules():
        if isinstance(module, BaseTunerLayer):
            parts = (*module.adapter_layer_names, *module.other_param_names)
        elif isinstance(module, ModulesToSaveWrapper):
            parts = ("modules_to_save",)
        else:
            continue
        prefix = f"{name}." if name else ""
        heads = tuple(f"{prefix}{part}" for part in parts)
        keys |= {k for k in backbone.state_dict() if k.startswith(heads)}
    return keys


def backbone_fingerprint(
    backbone: PreTrainedModel, gathered: dict[str, Tensor] | None = None
) -> str:
    """Which weights the backbone has, adapters not counted; `gathered` ones where given."""
    added, found = adapter_keys(backbone), gathered or {}
    kept = ((k, found.get(f"backbone.{k}", v)) for k, v in loaded_parameters(backbone))
    return fingerprint((plain_name(k), v) for k, v in kept if k not in added)


class SavingMixin:
    """`save_pretrained`, `from_pretrained` and adapters of a memwrap model."""

    # Provided by the model
    backbone: PreTrainedModel
    config: Any
    load_state_dict: Callable[..., Any]

    @property
    def memories(self) -> dict[str, Any]:
        """The memory modules by name."""
        raise NotImplementedError

    def add_lora(self, lora: LoraConfig | None = None, adapter_name: str = "default") -> None:
        """Put LoRA into the backbone: its other weights are frozen, the memories are trained.

        Args:
            lora: PEFT's config; default `LoraConfig()` with PEFT's targets for the family.
            adapter_name: name of the adapter.
        """
        config = copy.deepcopy(lora) if lora is not None else LoraConfig()
        inject_adapter_in_model(config, self.backbone, adapter_name)
        adapters = {**getattr(self.backbone, "peft_config", {}), adapter_name: config}
        self.backbone.peft_config = adapters
        for memory in self.memories.values():
            memory.requires_grad_(True)

    def adapters(self) -> dict[str, PeftConfig]:
        """PEFT configs of the adapters in the backbone, by name."""
        configs = getattr(self.backbone, "peft_config", None) or getattr(self, "peft_config", None)
        return dict(configs or {})

    def weights_to_save(
        self, include_base: bool, gathered: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What a saved model holds: memories and adapters, and all of the backbone if asked."""
        own = {
            f"memory_modules.{name}.{key}": value
            for name, memory in self.memories.items()
            for key, value in memory.state_dict().items()
        }
        added = adapter_keys(self.backbone)
        for key, value in self.backbone.state_dict().items():
            if include_base or key in added:
                own[f"backbone.{key}"] = value
        if gathered is None:
            return own
        found = {k: gathered.get(k, v) for k, v in own.items()}
        # What was gathered may be a part of a larger tensor, which safetensors would refuse.
        return {
            k: v if v.untyped_storage().nbytes() == v.nbytes else v.clone()
            for k, v in found.items()
        }

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        include_base: bool | None = None,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save memories, adapters and configs (safetensors and JSON).

        Args:
            save_directory: the folder. Files appear whole or not at all.
            include_base: also save the backbone's weights. Default: only if training changed
                them, since a base from the Hub would then no longer be the right one.
            is_main_process: False does nothing (other ranks).
            state_dict: the model's weights by name, where they are spread over processes (FSDP2):
                gathered on all of them, with `get_model_state_dict(model,
                options=StateDictOptions(full_state_dict=True))` of
                `torch.distributed.checkpoint.state_dict`.
            push_to_hub, repo_id, token: upload the folder afterwards.
            kwargs: accepted for transformers' callers, without effect here.

        Raises:
            ValueError: if weights are spread over processes and `state_dict` is not given.
        """
        if not is_main_process:
            return
        for name, value in self.named_parameters():  # type: ignore[attr-defined]
            if hasattr((state_dict or {}).get(name, value), "full_tensor"):
                raise ValueError(
                    f"{name} is spread over several processes; give the gathered weights as "
                    "`state_dict` (torch's get_model_state_dict with full_state_dict=True)."
                )
        if include_base is None:
            now = backbone_fingerprint(self.backbone, state_dict)
            changed = now != self.config.base_fingerprint
            include_base = changed or self.config.base_included
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.base_included, config.memwrap_version = include_base, VERSION
        config.backbone.dtype = self.backbone.dtype  # as it is now, not as it was loaded
        config.architectures = [type(self).__name__.removeprefix("FSDP")]  # as sharding names it
        config.adapters = {n: _json_able(c.to_dict()) for n, c in self.adapters().items()}
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            tensors = self.weights_to_save(include_base, state_dict)
            names = {id(v): k for k, v in reversed(tensors.items())}
            unique = {k: v.contiguous() for k, v in tensors.items() if names[id(v)] == k}
            if unique:
                plain = untied(unique)
                huggingface_hub.save_torch_state_dict(plain, scratch, metadata=checksums(plain))
            else:  # a memory without parameters
                save_file({}, scratch / WEIGHTS, metadata={"format": "pt"})
            config.save_pretrained(scratch)
            self.generation_config.save_pretrained(scratch)  # type: ignore[attr-defined]
            for old in folder.glob("model*.safetensors*"):
                if not (scratch / old.name).exists():
                    old.unlink()
            for file in scratch.iterdir():
                file.chmod(default_mode())  # safetensors writes private files
                os.replace(file, folder / file.name)
            for memory in self.memories.values():
                memory.save_files(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if push_to_hub:
            name = repo_id or folder.name
            api = huggingface_hub.HfApi(token=token)
            api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str = "Upload a memwrap model",
        **kwargs: Any,
    ) -> Any:
        """Save into a temporary folder and upload it through `huggingface_hub`.

        Args:
            repo_id: `"user/name"`.
            token, private, commit_message: as in `huggingface_hub`.
            kwargs: `include_base` as in `save_pretrained`.

        Returns:
            The commit's description.
        """
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message
            )

    def take_over(self, folder: str | Path) -> list[str]:
        """Start from what an earlier run trained: a stage of training hands over to the next.

        Weights that the folder holds (memory, adapters, a changed backbone) are taken over; those
        that only this model has, such as what a second stage adds, stay as they are.

        Args:
            folder: a saved memwrap model with the same memories and adapters.

        Returns:
            The names of the memory's and adapters' weights that stayed as they were.

        Raises:
            FileNotFoundError: if nothing is there.
            ValueError: if the folder holds other memories, or weights that this model lacks or
                has in another shape.
        """
        path = Path(folder)
        theirs = read_config(type(self), path)
        named = [values["name"] for values in theirs.memories or []]
        if named != list(self.memories):
            raise ValueError(
                f"{path} holds the memories {named}, this model {list(self.memories)}; a stage "
                "hands over to one with the same."
            )
        check_shape(theirs, self.backbone, path)
        _warn_of_another_base(theirs, self.backbone, path)
        tensors = read_weights(path)
        foreign = sorted(tensors.keys() - self.state_dict().keys())  # type: ignore[attr-defined]
        if foreign:
            raise ValueError(f"{path} holds {foreign[0]}, which this model has not.")
        put_weights(self, tensors, path)
        return sorted(self.weights_to_save(False).keys() - tensors.keys())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        base: PreTrainedModel | None = None,
        *,
        config: Any = None,
        revision: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ):
        """Load a saved model. See `memwrap.load`."""
        folder = _folder(pretrained_model_name_or_path, revision, token)
        own = read_config(cls, folder)
        place = None
        if base is None:
            if own.base_included:
                place = _one_place(kwargs, folder)
            base = _base_of(own, kwargs)
        elif kwargs and set(kwargs) - _IGNORED_KEYS:
            raise ValueError(
                f"{sorted(set(kwargs) - _IGNORED_KEYS)} go to the loading of the base, but a base "
                "was given; leave them out."
            )
        check_shape(own, base, folder)
        # Tokens that were added before it was wrapped.
        extend(base, own.backbone.get_text_config(decoder=True).vocab_size)
        _check_memories(own, folder)
        if not {"dtype", "torch_dtype", "quantization_config"} & kwargs.keys():
            _warn_of_another_base(own, base, folder)
        own.backbone = copy.deepcopy(base.config)
        model = cls(own, base)  # type: ignore[call-arg]
        for name, values in (own.adapters or {}).items():
            model.add_lora(_adapter(values, folder), name)
        _load_weights(model, folder)
        for memory in model.memories.values():
            memory.load_files(folder)
        if place is not None:
            model.to(place)  # type: ignore[attr-defined]
        return model.eval()  # type: ignore[attr-defined]


_IGNORED_KEYS = {
    "trust_remote_code", "_from_auto", "adapter_kwargs", "_commit_hash", "code_revision",
    "use_safetensors", "weights_only",
}  # fmt: skip


def _folder(name: str | Path, revision: str | None, token: str | None) -> Path:
    folder = asset(name) or Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name).count("/") > 1 or str(name).startswith("."):
        raise FileNotFoundError(f"There is no folder {name}; save a model there first.")
    return Path(huggingface_hub.snapshot_download(str(name), revision=revision, token=token))


def _base_of(config: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The backbone of a saved model: rebuilt to be filled, or found by its recorded name."""
    options = {k: v for k, v in kwargs.items() if k not in _IGNORED_KEYS}
    given = options.pop("dtype", None) or options.pop("torch_dtype", None)
    dtype = config.backbone.dtype if given in (None, "auto") else given
    if config.base_included:
        attention = options.get("attn_implementation")
        chosen = {} if attention is None else {"attn_implementation": attention}
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config.backbone), dtype=dtype, **chosen
        )
    if not config.base_model:
        raise ValueError(
            "The saved model does not name its base (it was wrapped in memory); give it: "
            "memwrap.load(folder, base)."
        )
    name = asset(config.base_model) or config.base_model
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)


def _adapter(values: dict[str, Any], folder: Path) -> Any:
    try:
        return PeftConfig.from_peft_type(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'} has no adapter that PEFT knows: {error}"
        ) from error


def _check_memories(config: Any, folder: Path) -> None:
    """Refuse settings of memories that are none, naming the file they stand in."""
    try:
        for values in config.memories or []:
            config_class(values["name"]).from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


# What loading a base by its name can do, and filling one from the saved model's own file cannot.
_NEEDS_A_NAME = (
    "quantization_config", "max_memory", "offload_folder", "tp_plan", "load_in_4bit", "load_in_8bit"
)  # fmt: skip


def _one_place(kwargs: dict[str, Any], folder: Path) -> Any:
    """The device that `device_map` names, for a saved model that holds its base's weights."""
    wanted = kwargs.get("device_map")
    places = set(wanted.values()) if isinstance(wanted, dict) else {wanted}
    refused = [name for name in _NEEDS_A_NAME if kwargs.get(name) is not None]
    if len(places) > 1 or "disk" in places:
        refused.append("device_map")
    if refused:
        raise ValueError(
            f"{folder} holds its base's weights, which are loaded onto one device: `{refused[0]}` "
            "does not go with it. Load the base yourself and give it: memwrap.load(folder, base)."
        )
    place = places.pop() if places else None
    if place in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return place


def _warn_of_another_base(config: Any, base: PreTrainedModel, folder: Path) -> None:
    known = not config.base_included and config.base_fingerprint
    if known and backbone_fingerprint(base) != config.base_fingerprint:
        warnings.warn(
            f"The base is not the one that {folder.name} was trained on (other weights or "
            "another dtype); results will differ.",
            stacklevel=3,
        )


def _load_weights(model: Any, folder: Path) -> None:
    tensors = read_weights(folder)
    needed = {k for k in model.weights_to_save(False) if not k.startswith("backbone.")}
    needed |= {f"backbone.{k}" for k in adapter_keys(model.backbone)}
    own = model.state_dict(keep_vars=True)
    there = {id(own[k]) for k in tensors.keys() & own.keys()}  # tied ones have one name in the file
    missing = sorted(k for k in needed - tensors.keys() if id(own[k]) not in there)
    foreign = sorted(tensors.keys() - model.state_dict().keys())
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"holds {foreign[0]}, which the model has not"
        raise ValueError(f"{folder / WEIGHTS} does not fit its config: it {what}.")
    put_weights(model, tensors, folder)


def _json_able(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _json_able(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_json_able(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_json_able(v) for v in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return value.value if hasattr(value, "value") else value
