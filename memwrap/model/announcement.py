"""`import memwrap` makes saved models known to transformers' Auto classes, and imports neither."""

from __future__ import annotations

import sys
from typing import Any

from memwrap.io.when_imported import when_imported

_AUTO = "transformers.models.auto"
_CONFIG = "memwrap.model.configuration"


class _Later(type):
    """A class that stands for the model's until somebody uses it."""

    def __getattr__(cls, name: str) -> Any:
        from memwrap.model.wrapping import MemoryModelForCausalLM

        return getattr(MemoryModelForCausalLM, name)


def announce() -> None:
    """Have the Auto classes find memwrap's config and model as soon as they are imported."""
    when_imported(f"{_AUTO}.configuration_auto", _register_config)
    when_imported(f"{_AUTO}.modeling_auto", _register_model)


def _register_config() -> None:
    if _CONFIG in sys.modules:  # it is what imports this now; `_register_model` comes later
        return
    from transformers.models.auto.configuration_auto import AutoConfig

    from memwrap.model.configuration import MemoryModelConfig

    AutoConfig.register("memwrap", MemoryModelConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from memwrap.model.configuration import MemoryModelConfig

    AutoConfig.register("memwrap", MemoryModelConfig, exist_ok=True)
    # Its config class is transformers' business here; everything else is asked of the model's.
    later = _Later("MemoryModelForCausalLM", (), {"config_class": MemoryModelConfig})
    AutoModelForCausalLM.register(MemoryModelConfig, later, exist_ok=True)


__all__ = ["announce"]
