"""Stands in for `memwrap.model.saving` in exported code: whole checkpoints, no adapters, no bases
elsewhere. Needs torch and transformers (with safetensors and huggingface_hub, which it brings)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import PreTrainedModel

from memwrap.backbones import Backbone
from memwrap.backbones.auto_classes import auto_class
from memwrap.io.whole_folders import rewriting
from memwrap.model.limits import building
from memwrap.model.weight_files import (
    CONFIG,
    OWN_FILES,
    SavedModel,
    check_names,
    put_weights,
    seal,
    write_model,
)


def plain_name(name: str) -> str:
    """Give a parameter's name; there are no adapters here."""
    return name


class SavingMixin:
    """`save_pretrained` and `from_pretrained` of a self-contained checkpoint."""

    # Provided by the model
    backbone: PreTrainedModel
    config: Any
    generation_config: Any
    load_state_dict: Callable[..., Any]
    state_dict: Callable[..., Any]

    @property
    def memories(self) -> dict[str, Any]:
        """The memory modules by name."""
        raise NotImplementedError

    def adapters(self) -> dict[str, Any]:
        """Give the configs of adapters in the backbone: there are none."""
        return {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load the checkpoint.

        Args:
            pretrained_model_name_or_path: the folder, or a repo id on the Hub.
            dtype: of the backbone; default as saved.
            attn_implementation: `"sdpa"` or `"eager"`.
            device_map: one device for the whole model.
            revision, token: for the Hub.

        Raises:
            FileNotFoundError: if nothing is there.
            ValueError: for damaged files, and for a model spread over several devices.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name = str(pretrained_model_name_or_path)
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, token=token))
        if (isinstance(device_map, dict) and set(device_map) - {""}) or device_map == "balanced":
            raise ValueError(
                f"device_map={device_map!r} spreads the model over devices; give one device."
            )
        saved = SavedModel(cls, folder)
        config = saved.config
        options = (
            {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        )
        kind = config.backbone.dtype if dtype in (None, "auto") else dtype
        with building(saved.tensors, folder / CONFIG):
            base = auto_class(config.backbone).from_config(
                copy.deepcopy(config.backbone), dtype=kind, trust_remote_code=False, **options
            )
            config.backbone = copy.deepcopy(base.config)
            model: Any = cls(config, Backbone(base))  # type: ignore[call-arg]
        check_names(model, saved.tensors, set(model.state_dict()), folder)
        put_weights(model, saved.tensors, folder)
        if saved.generation_config is not None:
            model.generation_config = saved.generation_config
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        return (model if device in (None, "auto") else model.to(device)).eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save weights, configs and this code into a folder.

        Args:
            save_directory: the folder.
            kwargs: accepted for transformers' callers, without effect here.
        """
        folder = Path(save_directory)
        with rewriting(folder, replaces=[OWN_FILES]) as new:
            write_model(new, self.state_dict(), self.config, self.generation_config)
            seal(new)
            for file in Path(__file__).parent.glob("*.py"):
                if not (folder / file.name).exists():
                    shutil.copy(file, new / file.name)
