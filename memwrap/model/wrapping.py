"""wrap, unwrap, load: how a user gets a memory model and gives it back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memwrap.assets import asset_name
from memwrap.backbones import Backbone
from memwrap.io.version import VERSION
from memwrap.memories.config import MemoryConfig
from memwrap.memories.registry import config_class, memory_class
from memwrap.model.adapter_switches import changes_base, check_comes_back
from memwrap.model.base_files import differs_from_files
from memwrap.model.configuration import MemoryModelConfig
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.model.saving import backbone_fingerprint


def wrap(
    model: PreTrainedModel, *memories: MemoryConfig | str, **settings: Any
) -> MemoryModelForCausalLM:
    """Attach memories to a causal LM.

    The model is not copied: its decoder layers learn to meet the memory, everything else stays
    as it is, and `unwrap` gives it back bit for bit.

    Examples:
        >>> import memwrap
        >>> from memwrap.assets import asset
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"))
        >>> model = memwrap.wrap(base, "armt", segment_size=128)
        >>> model.segment_size, list(model.memories)
        (128, ['armt'])

    Args:
        model: a transformers causal LM, or a PEFT (LoRA and the like) model over one: its
            adapters then stay in the backbone and are saved with the memory.
        memories: configs such as `ARMTConfig(segment_size=1024)`, or one name with its fields
            as keywords: `wrap(model, "armt", segment_size=1024)`.

    Returns:
        A `PreTrainedModel` with `generate`, on the same device and in the same mode.

    Raises:
        ValueError: if the model lacks a part that a memory needs, the memories' places collide,
            a setting is wrong, or its adapters would not come back from a saved model.
    """
    if isinstance(model, MemoryModelForCausalLM):
        raise ValueError(
            "The model is wrapped already; unwrap it first, or give all memories at once."
        )
    if isinstance(model, PeftModel):
        model = _inside_peft(model)
    adapters = getattr(model, "peft_config", None) or {}
    for adapter in adapters.values():
        check_comes_back(adapter)
    changed = any(changes_base(adapter, model) for adapter in adapters.values())
    parts = Backbone(model)  # says what a model lacks before anything is built
    changed = changed or differs_from_files(model)
    if parts.attached:
        raise ValueError(
            f"This {type(model).__name__} is inside another memory model already; memwrap.unwrap "
            "that one first, or load the backbone again."
        )
    configs = [_config(m, settings) for m in memories]
    if settings and not any(isinstance(m, str) for m in memories):
        raise ValueError(
            f"Settings {sorted(settings)} were given beside a config; put them into the config."
        )
    config = MemoryModelConfig(
        memories=[c.to_dict() for c in configs],
        # A copy: transformers resets the attention implementation of a live config put here.
        backbone=copy.deepcopy(model.config),
        base_model=asset_name(getattr(model.config, "_name_or_path", "") or ""),
        # What an adapter changed as it began, what was trained, or merged into, is nowhere else.
        base_fingerprint="" if changed else backbone_fingerprint(model),
        memwrap_version=VERSION,
    )
    config.backbone._name_or_path = config.base_model  # a shipped base has no path
    wrapped = MemoryModelForCausalLM(config, parts)
    for memory_config in configs:
        wrapped.memories[memory_config.name].open_named(memory_config)
    return wrapped.train(model.training)


def linearize(
    model: PreTrainedModel, memory: MemoryConfig | str = "liger", **settings: Any
) -> MemoryModelForCausalLM:
    """Turn the attention of a causal LM into a recurrence with a state of constant size.

    The same as `wrap`, for the methods that take the place of the attention: the result is not
    the base any more and needs some training before it is worth much.

    Examples:
        >>> import memwrap
        >>> from memwrap.assets import asset
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"))
        >>> model = memwrap.linearize(base, window_size=32)
        >>> list(model.memories)
        ['liger']

    Args:
        model: as for `wrap`.
        memory: `LigerConfig(...)` or another config that linearizes, or its name with its fields
            as keywords.

    Raises:
        ValueError: for a memory that leaves the attention as it is, and as `wrap`.
    """
    config = _config(memory, settings)
    if not memory_class(config.name).claims.linearizes:
        raise ValueError(
            f"The memory {config.name!r} stands beside the attention; attach it with memwrap.wrap. "
            "linearize takes one that replaces it, such as 'liger'."
        )
    return wrap(model, memory, **settings)


def _config(memory: MemoryConfig | str, settings: dict[str, Any]) -> MemoryConfig:
    if isinstance(memory, str):
        return config_class(memory).from_dict(settings)
    if not isinstance(memory, MemoryConfig):
        raise ValueError(
            f"A memory is given as {type(memory).__name__}; give a name or a config "
            "(memwrap.ARMTConfig(...))."
        )
    return memory


def _inside_peft(model: PeftModel) -> PreTrainedModel:
    """Take the base out of a PEFT model, with its adapters left inside it."""
    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            "The PEFT model adds prompt tokens outside its base, where a memory cannot keep them; "
            "wrap the base and use a LoRA-like method."
        )
    base: Any = model.get_base_model()
    base.peft_config = model.peft_config
    return base


def unwrap(model: MemoryModelForCausalLM) -> PreTrainedModel:
    """Give the backbone back as it was; the memory model must not be used afterwards.

    Examples:
        >>> import memwrap
        >>> from memwrap.assets import asset
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"))
        >>> memwrap.unwrap(memwrap.wrap(base, "rmt")) is base
        True

    Raises:
        ValueError: if the model is not a memwrap one.
    """
    if isinstance(model, PeftModel):
        raise ValueError("The memory model is inside a PeftModel; unwrap(model.get_base_model()).")
    if not isinstance(model, MemoryModelForCausalLM):
        raise ValueError(f"unwrap got a {type(model).__name__}; it needs a memwrap model.")
    model.parts.detach()
    return model.backbone


def load(
    path: str | Path,
    base: PreTrainedModel | str | Path | None = None,
    *,
    store: Any = None,
    **kwargs: Any,
) -> MemoryModelForCausalLM:
    """Load a saved memory model.

    No code of the folder runs, and nothing outside of it is followed unless it is named here: no
    path to a base that somebody else wrote down, no server of a store.

    Examples:
        >>> import memwrap
        >>> model = memwrap.load("armt-lm")  # shipped; a folder or a name on the Hub likewise
        >>> model.memory_configs[0].name
        'armt'

    Args:
        path: a folder, the name of a shipped model, or a repo id on the Hub.
        base: the backbone, or its name or folder; by default it is loaded by the name recorded at
            saving.
        store: for a kNN-LM, the store it searches (a `Store`, a folder or a URL) instead of the
            one in the folder; False for none.
        kwargs: for loading the base (`dtype`, `device_map`, `attn_implementation`,
            `use_safetensors`, ...), and `revision`, `token`, `cache_dir`, `local_files_only` for
            the Hub. What no loader here understands is refused.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the files are damaged, foreign, or do not fit each other or the base.
    """
    return MemoryModelForCausalLM.from_pretrained(path, base, store=store, **kwargs)


# Here and not beside the classes: exported copies of these must not take memwrap's own places.
AutoConfig.register("memwrap", MemoryModelConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryModelConfig, MemoryModelForCausalLM, exist_ok=True)
