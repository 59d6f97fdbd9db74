"""PEFT adapters inside a backbone: put in, chosen, switched off, and which of them are in use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.functional import delete_adapter, get_peft_model_state_dict, set_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

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


def changes_base(config: PeftConfig) -> bool:
    """Tell whether the adapter, as it began, changed the weights that it was put beside."""
    begins = getattr(config, "init_lora_weights", True)
    changed = isinstance(begins, str) and begins not in _HARMLESS
    return changed or bool(getattr(config, "kasa_config", None))


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
            unused = adapters_in(layer) - set(_used(layer))
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
    odd = {a for _, held, used in layers for a in every if a in held and a not in used}
    same = [adapter for adapter in every if adapter not in odd]
    return same + [f"{a} in {n}" for n, _, used in layers for a in used if a in odd]


def _used(layer: Any) -> list[str]:
    """List a layer's own adapters that count in what it computes."""
    active = [] if layer._disable_adapters else list(layer.active_adapters)
    merged = list(getattr(layer, "merged_adapters", ()))
    return [a for a in dict.fromkeys([*merged, *active]) if a in adapters_in(layer)]


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
        if settings.get("merged"):
            layer.merged_adapters = list(settings["merged"])
        if settings.get("disabled"):
            layer.enable_adapters(False)


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


class AdapterMixin:
    """The adapters of a memwrap model, which lie in its backbone: transformers' own methods for
    them, and PEFT's `set_adapter` of a model that was wrapped, see the same ones."""

    # Provided by the model
    backbone: PreTrainedModel

    @property
    def memories(self) -> dict[str, Any]:
        """The memory modules by name."""
        raise NotImplementedError

    def adapters(self) -> dict[str, PeftConfig]:
        """Give the PEFT configs of the adapters in the backbone, by name."""
        configs = getattr(self.backbone, "peft_config", None) or getattr(self, "peft_config", None)
        return dict(configs or {})

    def add_lora(self, lora: LoraConfig | None = None, adapter_name: str = "default") -> None:
        """Put LoRA into the backbone: its other weights are frozen, the memories are trained.

        Args:
            lora: PEFT's config; default `LoraConfig()` with PEFT's targets for the family.
            adapter_name: name of the adapter, which becomes the active one.

        Raises:
            ValueError: for a kind of adapter that would not come back from a saved model, or a
                name that is taken.
        """
        config = copy.deepcopy(lora) if lora is not None else LoraConfig()
        check_comes_back(config)
        if adapter_name in self.adapters():
            raise ValueError(f"There is an adapter {adapter_name!r} already; give another name.")
        # PEFT adds to the dict there is, which a PeftModel that was wrapped shares.
        known: dict | None = self.backbone.__dict__.get("peft_config")
        before = dict(known or {})
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                inject_adapter_in_model(config, self.backbone, adapter_name)
        except BaseException:
            if known is None:
                self.backbone.__dict__.pop("peft_config", None)
            else:
                known.clear()
                known.update(before)
            raise
        set_adapter(self.backbone, adapter_name)
        for memory in self.memories.values():
            memory.requires_grad_(True)

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Put an adapter into the backbone, as `add_lora`."""
        self.add_lora(adapter_config, adapter_name or "default")

    def load_adapter(
        self,
        peft_model_id: str,
        adapter_name: str | None = None,
        *,
        is_trainable: bool = False,
        **hub: Any,
    ) -> None:
        """Put an adapter that PEFT saved, for the backbone alone, into it.

        Args:
            peft_model_id: a folder or a name on the Hub.
            adapter_name: its name here.
            is_trainable: let it be trained.
            hub: `revision`, `token`, `cache_dir`, `subfolder` ...; what PEFT's loading takes.

        Raises:
            ValueError: as `add_lora`.
        """
        name = adapter_name or "default"
        config = PeftConfig.from_pretrained(peft_model_id, **hub)
        weights = load_peft_weights(peft_model_id, device="cpu", **hub)
        self.add_lora(config, name)
        wrong: Any = set_peft_model_state_dict(self.backbone, weights, adapter_name=name)
        if wrong.unexpected_keys:
            self.delete_adapter(name)
            raise ValueError(
                f"{peft_model_id} holds {wrong.unexpected_keys[0]}, which this backbone has not."
            )
        if not is_trainable:
            set_adapter(self.backbone, name, inference_mode=True)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make the named adapters, and no others, active.

        Raises:
            ValueError: for a name that is none.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_adapters(names)
        set_adapter(self.backbone, names if len(names) > 1 else names[0])

    def disable_adapters(self) -> None:
        """Switch all adapters off; what they are stays."""
        self._check_adapters()
        for _, layer in adapter_layers(self.backbone):
            layer.enable_adapters(False)

    def enable_adapters(self) -> None:
        """Switch the active adapters on again."""
        self._check_adapters()
        for _, layer in adapter_layers(self.backbone):
            layer.enable_adapters(True)

    def active_adapters(self) -> list[str]:
        """List the adapters that are active (which may be switched off)."""
        self._check_adapters()
        return list(switches_of(self.backbone).get("active", []))

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters out of the backbone for good.

        Raises:
            ValueError: for a name that is none, or a merged one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_adapters(names)
        for name in names:
            kind: Any = self.adapters()[name].peft_type
            delete_adapter(self.backbone, name, PEFT_TYPE_TO_PREFIX_MAPPING[kind])
            self.backbone.peft_config.pop(name)
        if not self.adapters():
            take_out(self.backbone)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict | None = None
    ) -> dict[str, Tensor]:
        """Collect an adapter's weights under the names that PEFT saves them by.

        Args:
            adapter_name: default: the first active one.
            state_dict: of the backbone, where its weights were gathered.
        """
        name = adapter_name or self.active_adapters()[0]
        self._check_adapters([name])
        return get_peft_model_state_dict(self.backbone, state_dict=state_dict, adapter_name=name)

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what replaces one adapter's weights by another's behind the states' back."""
        raise ValueError(
            "Hot swapping is not followed by a memwrap model; load the adapters under different "
            "names (load_adapter) and choose with set_adapter."
        )

    def _check_adapters(self, names: Sequence[str] = ()) -> None:
        known = self.adapters()
        if not known:
            raise ValueError("The backbone has no adapter; add one first (add_lora, load_adapter).")
        if names == []:
            raise ValueError("Give the name of at least one adapter (disable_adapters for none).")
        for name in names:
            if name not in known:
                raise ValueError(f"There is no adapter {name!r}; the backbone has {sorted(known)}.")


__all__ = ["AdapterMixin", "adapter_keys", "adapters_in_use", "check_comes_back"]
