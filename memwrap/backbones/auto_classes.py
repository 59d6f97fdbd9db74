"""Which of transformers' auto classes builds a backbone of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

# Models that read pictures and sound, too, are kept apart from those of text alone.
_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING",
}
_HUB = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")


class OneClass:
    """One class of transformers, used as an auto class is."""

    def __init__(self, kind: Any) -> None:
        self.from_pretrained = kind.from_pretrained
        self._build = kind._from_config

    def from_config(self, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
        options.pop("trust_remote_code", None)
        return self._build(config, **options)


def auto_class(config: PreTrainedConfig) -> Any:
    """Find what builds a model of a config: the auto class that makes what `config.architectures`
    names, or else that class of transformers, or else the first auto class that knows the config or
    that its code is for.
    """
    candidates: list[tuple[Any, set[str]]] = []
    for name, mapping_name in _AUTO.items():
        mapping = getattr(modeling_auto, mapping_name, {})
        if type(config) in mapping:
            made = mapping[type(config)]
            kinds = made if isinstance(made, tuple) else (made,)
            candidates.append((getattr(modeling_auto, name), {kind.__name__ for kind in kinds}))
    wanted = list(config.architectures or ())
    for auto, classes in candidates:
        if classes & set(wanted):
            return auto
    for name in wanted:
        kind: Any = getattr(transformers, name, None)
        known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        if known and kind.config_class is type(config) and kind.can_generate():
            return OneClass(kind)
    code = getattr(config, "auto_map", None) or {}  # of a model that brings its own
    named = [getattr(modeling_auto, name) for name in _AUTO if not candidates and name in code]
    return candidates[0][0] if candidates else (named or [AutoModelForCausalLM])[0]


def brings_code(model: PreTrainedModel) -> bool:
    """Tell whether a model's class came with its weights (`trust_remote_code`)."""
    return type(model).__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def load_backbone(place: str | Path, **options: Any) -> PreTrainedModel:
    """Load a base from a folder or the Hub, with the class that its config asks for.

    Args:
        place: the folder or repo id.
        options: of `from_pretrained`.
    """
    hub = {name: options[name] for name in _HUB if name in options}
    return auto_class(AutoConfig.from_pretrained(place, **hub)).from_pretrained(place, **options)
