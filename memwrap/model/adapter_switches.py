"""PEFT adapters inside a backbone: which come back, which are in use, and how they are switched."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# The kinds of adapters whose saved models were loaded again with the same logits (the tests try
# every kind that PEFT has). The others keep something outside the backbone's layers, change its
# weights as they begin, need a PeftModel around it in every call, or look at all tokens of a call.
COME_BACK = frozenset({
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA",
    "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "PSOFT",
    "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TRAINABLE_TOKENS", "WAVEFT",
})  # fmt: skip
# Fields that do not come back either: they double layers, or what they do depends on the ids of a
# call or on other adapters, which only a PeftModel knows.
_REFUSED = ("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config")
# Ways to begin that leave the base as it is.
_HARMLESS = ("gaussian", "eva", "orthogonal")


def check_comes_back(config: PeftConfig) -> None:
    """Refuse an adapter that a saved model would not come back with.

    Raises:
        ValueError: names its kind, or the field.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in COME_BACK:
        raise ValueError(
            f"Adapters of the kind {kind} would not come back from a saved memwrap model. Use LoRA "
            "or another that stays inside the layers, or merge it first (merge_and_unload)."
        )
    for name in _REFUSED:
        if getattr(config, name, None):
            raise ValueError(
                f"An adapter with `{name}` would not come back from a saved memwrap model; leave "
                "it out, or merge the adapter first (merge_and_unload)."
            )


def check_memory(name: str, memory: nn.Module) -> None:
    """Refuse to save a memory that PEFT put adapters into, or put copies beside.

    Raises:
        ValueError: names the first one.
    """
    inside = next((module for module, _ in adapter_layers(memory)), None)
    if inside is not None:
        raise ValueError(
            f"PEFT reached into the memory ({name}.{inside}), which would not come back. Save the "
            "PeftModel around it (its own save_pretrained), merge it first (merge_and_unload), or "
            "give the PEFT config modules_to_save=['memory_modules'], which keeps it out."
        )


def begins_by_changing(begins: Any) -> bool:
    """Tell whether LoRA with this `init_lora_weights` changes the weights of its base first."""
    return isinstance(begins, str) and begins not in _HARMLESS


def changes_base(config: PeftConfig, base: nn.Module) -> bool:
    """Tell whether the adapter, as it began or as it is trained (biases), changes the weights of
    the base that it was put beside."""
    changed = begins_by_changing(getattr(config, "init_lora_weights", True))
    trained = getattr(config, "bias", "none") != "none"
    trained = trained and any(name.endswith("bias") for name, _ in base.named_parameters())
    return changed or trained or bool(getattr(config, "kasa_config", None))


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the modules that hold adapters, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, module


def adapters_in(layer: Any) -> set[str]:
    """Name the adapters that a layer holds itself."""
    if not isinstance(layer, BaseTunerLayer):
        return set(layer._adapters)
    parts: list[Any] = [getattr(layer, part, None) for part in layer.adapter_layer_names]
    return {name for part in parts if hasattr(part, "keys") for name in part.keys()}  # noqa: SIM118


def adapter_keys(backbone: nn.Module, idle: bool = False) -> set[str]:
    """Name the tensors that PEFT put into the backbone; with `idle` those of adapters that are in
    no layer's use."""
    keys: set[str] = set()
    names = set(backbone.state_dict())
    for name, layer in adapter_layers(backbone):
        if isinstance(layer, BaseTunerLayer):
            parts = [*layer.adapter_layer_names, *layer.other_param_names]
        elif isinstance(layer, ModulesToSaveWrapper):
            parts = ["modules_to_save"]
        else:
            continue
        heads = [f"{name}.{part}" if name else part for part in parts]
        if idle:
            unused = adapters_in(layer) - set(_counting(layer))
            heads = [f"{head}.{adapter}" for head in heads for adapter in unused]
            ends = tuple(heads), tuple(f"{head}." for head in heads)
            keys |= {k for k in names if k in ends[0] or k.startswith(ends[1])}
        else:
            keys |= {k for k in names if k.startswith(tuple(heads))}
    return keys


def adapters_in_use(model: nn.Module) -> list[str]:
    """List the adapters that what the model computes depends on: active or merged ones. Where
    layers differ, the layer stands beside the name."""
    layers = [(name, adapters_in(layer), _used(layer)) for name, layer in adapter_layers(model)]
    every = list(dict.fromkeys(adapter for _, _, used in layers for adapter in used))
    odd = {a for _, held, used in layers for a in every if _name(a) in held and a not in used}
    same = [adapter for adapter in every if adapter not in odd]
    return same + [f"{a} in {n}" for n, _, used in layers for a in used if a in odd]


def _used(layer: Any) -> list[str]:
    """List a layer's own adapters that count in what it computes, with the factor of scaled
    ones."""
    factors = _factors(layer)
    return [f"{a} x {factors[a]}" if a in factors else a for a in _counting(layer)]


def _name(used: str) -> str:
    return used.rpartition(" x ")[0] or used


def _counting(layer: Any) -> list[str]:
    active = [] if layer._disable_adapters else list(layer.active_adapters)
    merged = list(getattr(layer, "merged_adapters", ()))
    return [a for a in dict.fromkeys([*merged, *active]) if a in adapters_in(layer)]


def _factors(layer: Any) -> dict[str, float]:
    """Give the factors that adapters were scaled by afterwards (PEFT's `set_scale`), by name."""
    alphas = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", None)
    if not isinstance(alphas, dict) or not hasattr(layer, "set_scale"):
        return {}
    rooted = getattr(layer, "use_rslora", {})
    factors = {}
    for name, scale in layer.scaling.items():
        rank = layer.r[name] ** (0.5 if rooted.get(name) else 1)
        factor = round(scale * rank / alphas[name], 6) if alphas[name] else 1.0
        if factor != 1:
            factors[name] = factor
    return factors


def switches_of(backbone: nn.Module) -> dict[str, Any]:
    """Describe, for a saved config, which adapters are active, switched off and merged: what all
    layers share, and under `layers` what single ones have instead.

    Raises:
        ValueError: if a merged adapter could not be taken out of the weights again.
    """
    each = {name: _switches(layer) for name, layer in adapter_layers(backbone)}
    for name, layer in adapter_layers(backbone):
        if getattr(layer, "merged_adapters", None) and getattr(layer, "_caches", None):
            raise ValueError(
                f"{name} has a merged adapter that remembers the weights it was merged into; "
                "unmerge it (unmerge_adapter) before saving."
            )
    if not each:
        return {}
    common: dict[str, Any] = next(iter(each.values()))
    odd = {name: settings for name, settings in each.items() if settings != common}
    return {**common, "layers": odd} if odd else common


def _switches(layer: Any) -> dict[str, Any]:
    return {
        "active": list(layer.active_adapters),
        "disabled": bool(layer._disable_adapters),
        "merged": list(getattr(layer, "merged_adapters", ())),
        **({"factors": _factors(layer)} if _factors(layer) else {}),
    }


def switch(backbone: nn.Module, switches: Any, merged: bool) -> None:
    """Put every adapter in the state that `switches_of` described.

    Args:
        backbone: with the adapters in it.
        switches: of a saved config.
        merged: whether merged adapters can be in the weights that are loaded.

    Raises:
        ValueError: if the description is none, or does not fit the adapters.
    """
    if not switches:
        return
    layers = dict(adapter_layers(backbone))
    known = {name for layer in layers.values() for name in adapters_in(layer)}
    odd = switches.get("layers", {}) if isinstance(switches, dict) else None
    if not isinstance(odd, dict) or not odd.keys() <= layers.keys():
        raise ValueError("The saved state of the adapters names layers that hold none.")
    for name, layer in layers.items():
        settings = odd.get(name, switches)
        for kind in ("active", "merged"):
            names = settings.get(kind, []) if isinstance(settings, dict) else None
            if not isinstance(names, list) or any(n not in known for n in map(str, names)):
                raise ValueError(f"The saved state of the adapters names {names}, which is none.")
        if settings.get("merged") and not merged:
            raise ValueError("An adapter is said to be merged, but the base's weights are missing.")
        _set(layer, settings["active"])
        _scale(layer, settings.get("factors", {}))
        if settings.get("merged"):
            layer.merged_adapters = list(settings["merged"])
        if settings.get("disabled"):
            layer.enable_adapters(False)


def _scale(layer: Any, factors: Any) -> None:
    known = getattr(layer, "scaling", {})
    right = isinstance(factors, dict) and all(
        name in known and type(f) in (int, float) and math.isfinite(f)
        for name, f in factors.items()
    )
    if not right:
        raise ValueError(f"The saved state of the adapters scales {factors}, which is no adapter.")
    for name, factor in factors.items():
        layer.set_scale(name, factor)


def _set(layer: Any, names: list[str]) -> None:
    if isinstance(layer, BaseTunerLayer):
        layer.set_adapter(names)
        return
    held = [name for name in names if name in adapters_in(layer)]
    layer.set_adapter(held[:1])  # of copies one is active


def take_out(backbone: nn.Module, spared: Collection[int] = ()) -> None:
    """Put the modules that adapters wrap back into their places.

    Args:
        spared: identities of modules that stay.
    """
    for name, layer in list(adapter_layers(backbone)):
        if id(layer) in spared:
            continue
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, _inner(layer))


def _inner(module: Any) -> nn.Module:
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner: Any = module
        module = getattr(inner, "base_layer", None) or inner.original_module
    return module
