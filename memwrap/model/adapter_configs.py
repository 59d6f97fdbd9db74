"""Adapters in a saved config: plain names instead of patterns, and nothing half-done to a base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from memwrap.backbones import Backbone
from memwrap.model.adapter_switches import adapters_in, take_out

# PEFT matches names against these as regular expressions.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
_BY_PATTERN = ("rank_pattern", "alpha_pattern")
_REPEATS = set("*+?{}()[]|")
# What was read once to begin a training, or says where things are on this machine.
_LEFT_OUT = (
    "base_model_name_or_path", "revision", "auto_mapping", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
)  # fmt: skip
_REFUSED = ("megatron_config", "adapters")  # they import a module, or read other folders


def plain_adapter(name: str, config: PeftConfig, backbone: PreTrainedModel) -> dict[str, Any]:
    """Make the JSON-able config of an adapter in a backbone, with the names of its modules in place
    of patterns for them."""
    values = _json_able(config.to_dict())
    for key in _LEFT_OUT:
        if key in values:
            values[key] = None
    if not any(is_pattern(values.get(key)) for key in (*_PATTERNS, *_BY_PATTERN)):
        return values
    adapted = {n: m for n, m in backbone.named_modules() if _holds(m, name)}
    # What is adapted by parameter (experts) is named by `target_parameters`, as it was.
    targets = [n for n, m in adapted.items() if not hasattr(m, "parameter_name")]
    parameters = [
        f"{n.replace('.base_layer', '')}.{m.parameter_name}"
        for n, m in adapted.items()
        if hasattr(m, "parameter_name")
    ]
    for key in _BY_PATTERN:
        by_target = {t: _by_pattern(values.get(key) or {}, t) for t in (*targets, *parameters)}
        if key in values:
            values[key] = {t: value for t, value in by_target.items() if value is not None}
    if is_pattern(values.get("feedforward_modules")):
        pattern = values["feedforward_modules"]
        values["feedforward_modules"] = [t for t in targets if re.fullmatch(pattern, t)]
    values["target_modules"] = targets
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if key in values:
            values[key] = None
    return values


def adapter_of(values: Any) -> Any:
    """Build the adapter that a saved config describes.

    Raises:
        ValueError: for one that PEFT does not know, or that could run without end, import modules
            or read other files.
    """
    if not isinstance(values, dict):
        raise ValueError(f"An adapter is {type(values).__name__}; it must be PEFT's config.")
    for key in _REFUSED:
        if values.get(key):
            raise ValueError(f"An adapter has `{key}`, which is not followed from a file.")
    values = {key: value for key, value in values.items() if key not in _LEFT_OUT}
    if is_pattern(values):
        raise ValueError(
            "An adapter has a pattern that repeats or branches; matching it could take for ever. "
            "Write the modules' names instead."
        )
    # Its weights come from the file; PEFT need not begin it, some ways of which change the base.
    values = {k: True if k.startswith("init_") and isinstance(v, str) else v
              for k, v in values.items()}  # fmt: skip
    try:
        return PeftConfig.from_peft_type(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"An adapter is none that PEFT knows: {error}") from error


def is_pattern(value: Any) -> bool:
    """Tell whether a string in it can, as a pattern, repeat or branch."""
    if isinstance(value, dict):
        return any(is_pattern(x) for pair in value.items() for x in pair)
    if isinstance(value, list):
        return any(is_pattern(x) for x in value)
    return isinstance(value, str) and bool(_REPEATS & set(value))


@contextmanager
def untouched_if_it_fails(base: PreTrainedModel) -> Iterator[None]:
    """Take memories and new adapters off a base again if the block fails."""
    trained = {name: p.requires_grad for name, p in base.named_parameters()}
    configs = getattr(base, "peft_config", None)
    before = {id(module) for module in base.modules()}
    try:
        yield
    except BaseException:
        with suppress(Exception):  # a base that cannot be looked at holds nothing of ours
            Backbone(base).detach()
        take_out(base, before)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
        if configs is not None:
            base.peft_config = configs
        elif hasattr(base, "peft_config"):
            del base.peft_config
        raise


def _holds(module: nn.Module, name: str) -> bool:
    """Tell whether an adapter of this name is in the module itself."""
    return isinstance(module, BaseTunerLayer) and name in adapters_in(module)


def _by_pattern(patterns: dict[str, Any], name: str) -> Any:
    """Find what PEFT finds for a module: the value of the first pattern that its name ends with."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return None


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
