"""Saving what was trained (memories, adapters, a changed backbone), and loading it again."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor
from transformers import PreTrainedModel

from memwrap.backbones import Backbone
from memwrap.backbones.auto_classes import brings_code
from memwrap.backbones.offloaded import at_hand, loaded_parameters
from memwrap.backbones.vocabulary import extend
from memwrap.io.atomic_files import SCRATCH
from memwrap.io.fingerprints import fingerprint
from memwrap.io.own_paths import mark_of
from memwrap.io.version import VERSION
from memwrap.io.whole_folders import SAVED, rewriting
from memwrap.memories.registry import config_class
from memwrap.model.adapter_configs import adapter_of, plain_adapter, untouched_if_it_fails
from memwrap.model.adapter_methods import AdapterMixin
from memwrap.model.adapter_switches import (
    adapter_keys,
    check_comes_back,
    check_memory,
    switch,
    switches_of,
)
from memwrap.model.base_files import plain_name, quantised_kind
from memwrap.model.base_loading import HUB_OPTIONS, find_folder, load_base, options_in, place_of
from memwrap.model.limits import building, try_large_settings
from memwrap.model.weight_files import (
    CONFIG,
    OWN_FILES,
    SavedModel,
    check_names,
    check_shape,
    put_weights,
    seal,
    write_model,
)

# What a writer that was killed may have left.
NOT_UPLOADED = [f"{SCRATCH}/*", f"{SAVED}/*", ".lock"]


def backbone_fingerprint(
    backbone: PreTrainedModel, gathered: dict[str, Tensor] | None = None
) -> str:
    """Hash the backbone's weights, adapters not counted; `gathered` ones where given."""
    added, tensors = adapter_keys(backbone), gathered or {}
    kept = ((k, tensors.get(f"backbone.{k}", v)) for k, v in loaded_parameters(backbone))
    return fingerprint((plain_name(k), v) for k, v in kept if k not in added)


# What transformers' callers may say of how a model is saved.
_SAVED_AS: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True,), "variant": (None,), "save_peft_format": (True,),
    "save_original_format": (True, False), "distributed_checkpoint": (False,),
}  # fmt: skip


def _refuse_other_ways(options: dict[str, Any]) -> None:
    """Refuse keywords of `save_pretrained` that ask for another way to save.

    Raises:
        ValueError: names the keyword.
    """
    for name, value in options.items():
        if name != "save_function" and value not in _SAVED_AS.get(name, ()):
            raise ValueError(
                f"save_pretrained got {name}={value!r}; a memwrap model is saved in one way, "
                "as safetensors and JSON. Leave it out."
            )


class SavingMixin(AdapterMixin):
    """`save_pretrained`, `from_pretrained` and adapters of a memwrap model."""

    # Provided by the model
    backbone: PreTrainedModel
    config: Any
    load_state_dict: Callable[..., Any]

    def weights_to_save(
        self, include_base: bool, gathered: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Collect what a saved model holds: memories and adapters, and all of the backbone if
        asked."""
        tensors = {
            f"memory_modules.{name}.{key}": value
            for name, memory in self.memories.items()
            for key, value in memory.state_dict().items()
        }
        added = adapter_keys(self.backbone)
        for key, value in self.backbone.state_dict().items():
            if include_base or key in added:
                tensors[f"backbone.{key}"] = value
        if gathered is None:
            return tensors
        whole = {k: gathered.get(k, v) for k, v in tensors.items()}
        # What was gathered may be a part of a larger tensor, which safetensors would refuse.
        return {
            k: v if v.untyped_storage().nbytes() == v.nbytes else v.clone()
            for k, v in whole.items()
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
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Save memories, adapters and configs (safetensors and JSON).

        Args:
            save_directory: the folder. Files appear whole or not at all.
            include_base: also save the backbone's weights. Default: only if training or a merged
                adapter changed them, before it was wrapped or after, since a base from the Hub
                would then no longer be the right one.
            is_main_process: False does nothing (other ranks).
            state_dict: the model's weights by name, where they are spread over processes (FSDP2):
                gathered on all of them, with `get_model_state_dict(model,
                options=StateDictOptions(full_state_dict=True))` of
                `torch.distributed.checkpoint.state_dict`.
            push_to_hub, repo_id, token: upload the folder afterwards.
            max_shard_size: largest file of weights; more of them are made.
            kwargs: what else transformers' callers give, as long as it says what is so anyway.

        Raises:
            ValueError: for other keywords, if weights are spread over processes and `state_dict`
                is not given, or adapters are in a state that would not come back.
        """
        _refuse_other_ways(kwargs)
        if not is_main_process:
            return
        for name, value in self.named_parameters():  # type: ignore[attr-defined]
            if hasattr((state_dict or {}).get(name, value), "full_tensor"):
                raise ValueError(
                    f"{name} is spread over several processes; give the gathered weights as "
                    "`state_dict` (torch's get_model_state_dict with full_state_dict=True)."
                )
        for adapter in self.adapters().values():
            check_comes_back(adapter)
        for name, memory in self.memories.items():
            check_memory(name, memory)
        switches = switches_of(self.backbone)
        folder = Path(save_directory)
        config = copy.deepcopy(self.config)
        merged = "'merged': ['" in str(switches)
        include_base = self._note_base(config, include_base, merged, state_dict)
        config.memwrap_version = VERSION
        config.backbone.dtype = self.backbone.dtype  # as it is now, not as it was loaded
        config.backbone.architectures = [type(self.backbone).__name__.removeprefix("FSDP")]
        config.architectures = [type(self).__name__.removeprefix("FSDP")]  # as sharding names it
        config.adapters = {
            n: plain_adapter(n, c, self.backbone) for n, c in self.adapters().items()
        }
        config.adapter_switches = switches
        whole: Any = self
        tensors = at_hand(whole, self.weights_to_save(include_base, state_dict))
        marks: dict[str, str] = {}
        with rewriting(folder, replaces=[OWN_FILES]) as new:
            settings = self.generation_config  # type: ignore[attr-defined]
            write_model(new, tensors, config, settings, max_shard_size)
            for memory in self.memories.values():
                marks |= memory.save_files(new, folder)
            seal(new, marks)
        if push_to_hub:
            name = repo_id or folder.name
            api = huggingface_hub.HfApi(token=token)
            api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=NOT_UPLOADED)

    def _note_base(
        self, config: Any, include: bool | None, merged: bool, gathered: dict[str, Tensor] | None
    ) -> bool:
        """Note in a config where the base's weights are to be found; tell whether they are saved.

        Raises:
            ValueError: if they would be lost, or cannot be saved.
        """
        if merged and include is False:
            raise ValueError(
                "An adapter is merged into the backbone's weights, so these belong to the model: "
                "leave include_base out, or unmerge it first (unmerge_adapter)."
            )
        quantised = quantised_kind(self.backbone)
        if quantised and include:
            raise ValueError(
                f"The backbone's weights are quantised ({quantised}), which a saved memwrap model "
                "does not hold: leave include_base out, and give the base as it is to memwrap.load."
            )
        looked = include is None or bool(quantised)
        now = backbone_fingerprint(self.backbone, gathered) if looked else ""
        changed = merged or now != config.base_fingerprint
        if include is None:
            include = (changed or config.base_included) and not quantised
        known = getattr(config.backbone, "quantization_config", None) is not None
        if quantised and (changed or not known):  # no name leads to these weights
            config.base_model, config.base_fingerprint = "", now
        config.base_included, config.base_code = include, brings_code(self.backbone)
        is_folder = bool(config.base_model) and os.path.isdir(config.base_model)
        config.base_mark = mark_of(config.base_model) if is_folder else ""
        return include

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

    def take_over(self, folder: str | Path, *, whole: bool = True) -> list[str]:
        """Start from what an earlier run trained: a stage of training hands over to the next.

        Weights that the folder holds (memory, adapters, a changed backbone) are taken over; those
        that only this model has, such as what a second stage adds, stay as they are.

        Args:
            folder: a saved memwrap model with the same memories and adapters.
            whole: refuse weights that this model lacks; False leaves them out, as where fewer
                layers are converted.

        Returns:
            The names of the memory's and adapters' weights that stayed as they were.

        Raises:
            FileNotFoundError: if nothing is there.
            ValueError: if the folder holds other memories, or weights that this model lacks or
                has in another shape.
        """
        path = Path(folder)
        saved = SavedModel(type(self), path)
        saved_config, tensors = saved.config, saved.tensors
        named = [values["name"] for values in saved_config.memories or []]
        if named != list(self.memories):
            raise ValueError(
                f"{path} holds the memories {named}, this model {list(self.memories)}; a stage "
                "hands over to one with the same."
            )
        check_shape(saved_config, self.backbone, path)
        _warn_of_another_base(saved_config, self.backbone, path)
        foreign = sorted(tensors.keys() - self.state_dict().keys())  # type: ignore[attr-defined]
        if foreign and whole:
            raise ValueError(f"{path} holds {foreign[0]}, which this model has not.")
        tensors = {name: value for name, value in tensors.items() if name not in foreign}
        put_weights(self, tensors, path)
        return sorted(self.weights_to_save(False).keys() - tensors.keys())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        base: PreTrainedModel | str | Path | None = None,
        *,
        config: Any = None,
        revision: str | None = None,
        subfolder: str | None = None,
        store: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ):
        """Load a saved model. See `memwrap.load`; with `output_loading_info` a pair of it and of
        what transformers reports, which is nothing: files that do not fit are errors."""
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        folder = find_folder(pretrained_model_name_or_path, subfolder, revision=revision, **hub)
        saved = SavedModel(cls, folder)
        saved_config = saved.config
        if base is None or isinstance(base, (str, Path)):
            kwargs = {**options_in(config, saved_config, folder), **kwargs}
        _check_memories(saved_config, folder)
        place = place_of(kwargs) if base is None and saved_config.base_included else None
        backbone = load_base(saved, base, kwargs)
        check_shape(saved_config, backbone, folder)
        _grow(backbone, saved_config, folder, given=backbone is base)
        if not {"dtype", "torch_dtype", "quantization_config"} & kwargs.keys():
            _warn_of_another_base(saved_config, backbone, folder)
        saved_config.backbone = copy.deepcopy(backbone.config)
        with untouched_if_it_fails(backbone):
            with building(saved.tensors, folder / CONFIG):
                model = cls(saved_config, Backbone(backbone))  # type: ignore[call-arg]
                for name, values in (saved_config.adapters or {}).items():
                    model.add_lora(adapter_of(values), name)
                switch(backbone, saved_config.adapter_switches, merged=saved_config.base_included)
            whole = base is None and saved_config.base_included
            check_names(model, saved.tensors, set(model.weights_to_save(whole)), folder)
            put_weights(model, saved.tensors, folder)
            if saved.generation_config is not None:
                model.generation_config = saved.generation_config  # type: ignore[attr-defined]
            _load_files(model, saved, store)
            try_large_settings(model, saved.tensors, folder / CONFIG)
        # Trainers load references by it.
        saved_config._name_or_path = str(pretrained_model_name_or_path)
        if place is not None:
            model.to(place)  # type: ignore[attr-defined]
        model.eval()  # type: ignore[attr-defined]
        return (model, {name: set() for name in _REPORTED}) if output_loading_info else model


_REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
# A token for each of so many things that a model learns to write is added before it is wrapped.
_MOST_NEW_TOKENS = 4096


def _grow(base: PreTrainedModel, config: Any, folder: Path, *, given: bool) -> None:
    """Give the base the tokens that were added to it before it was wrapped."""
    size = config.backbone.get_text_config(decoder=True).vocab_size
    table: Any = base.get_input_embeddings()
    have = table.weight.shape[0]
    if given and size > have:
        raise ValueError(
            f"The model in {folder.name} has {size} ids, the given base {have}: add the missing "
            "tokens to it first, as memwrap.backbones.vocabulary.add_token does."
        )
    if size > have + _MOST_NEW_TOKENS:
        raise ValueError(
            f"{folder / CONFIG} asks for {size} ids, its base has {have}; at most "
            f"{_MOST_NEW_TOKENS} are added to a base."
        )
    extend(base, size)


def _check_memories(config: Any, folder: Path) -> None:
    """Refuse settings of memories that are none, naming the file they stand in."""
    try:
        for values in config.memories or []:
            config_class(values["name"]).from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def _warn_of_another_base(config: Any, base: PreTrainedModel, folder: Path) -> None:
    known = not config.base_included and config.base_fingerprint
    if known and backbone_fingerprint(base) != config.base_fingerprint:
        warnings.warn(
            f"The base is not the one that {folder.name} was trained on (other weights or "
            "another dtype); results will differ.",
            stacklevel=3,
        )


def _load_files(model: Any, saved: SavedModel, store: Any) -> None:
    """Let memories read what they wrote beside the weights, or take the store that is named."""
    takers = [memory for memory in model.memories.values() if memory.takes_store]
    if store not in (None, False) and not takers:
        raise ValueError(f"`store` was given, but no memory in {saved.folder.name} searches one.")
    for memory in model.memories.values():
        memory.load_files(saved.folder, saved.marks, store if memory.takes_store else None)
