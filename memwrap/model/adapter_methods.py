"""The methods of a memwrap model for the PEFT adapters in its backbone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.functional import delete_adapter, get_peft_model_state_dict, set_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from memwrap.model.adapter_files import CONFIG, WEIGHTS, read_adapter
from memwrap.model.adapter_switches import (
    adapter_layers,
    check_comes_back,
    switches_of,
    take_out,
)
from memwrap.model.base_loading import find_folder
from memwrap.model.limits import building


class AdapterMixin:
    """The adapters of a memwrap model, which lie in its backbone: transformers' own methods for
    them, and PEFT's `set_adapter` of a model that was wrapped, see the same ones."""

    # Provided by the model
    backbone: PreTrainedModel

    @property
    def memories(self) -> dict[str, Any]:
        """The memory modules by name."""
        raise NotImplementedError

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie what the backbone ties, unless adapters hold it, which keep it tied themselves."""
        if not self.adapters():
            super().tie_weights(*args, **kwargs)  # type: ignore[misc]

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
        with self._or_as_it_was(adapter_name, config.peft_type), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            inject_adapter_in_model(config, self.backbone, adapter_name)
        set_adapter(self.backbone, adapter_name)
        for memory in self.memories.values():
            memory.requires_grad_(True)

    @contextmanager
    def _or_as_it_was(self, name: str, kind: Any) -> Iterator[None]:
        """Take a new adapter, half of one too, out again if the block fails."""
        # PEFT adds to the dict there is, which a PeftModel that was wrapped shares.
        known: dict | None = self.backbone.__dict__.get("peft_config")
        before = dict(known or {})
        active = self.active_adapters() if before else []
        modules = {id(module) for module in self.backbone.modules()}
        trained = [(p, p.requires_grad) for p in self.parameters()]  # type: ignore[attr-defined]
        try:
            yield
        except BaseException:
            take_out(self.backbone, modules)
            delete_adapter(self.backbone, name, PEFT_TYPE_TO_PREFIX_MAPPING[kind])
            if known is None:
                self.backbone.__dict__.pop("peft_config", None)
            else:
                known.clear()
                known.update(before)
            if active:
                set_adapter(self.backbone, active)
            for parameter, was in trained:
                parameter.requires_grad_(was)
            raise

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
            hub: `subfolder`, `revision`, `token`, `cache_dir` ... for a name on the Hub.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: as `add_lora`; for damaged files, links to elsewhere, and weights that are
                not those of the adapter in this backbone. The backbone is then as it was.
        """
        name = adapter_name or "default"
        wanted = [f"*{file}" for file in (CONFIG, WEIGHTS)]
        folder = find_folder(peft_model_id, allow_patterns=wanted, **hub)
        config, weights = read_adapter(folder)
        if name in self.adapters():
            raise ValueError(f"There is an adapter {name!r} already; give another name.")
        path = folder / CONFIG
        with self._or_as_it_was(name, config.peft_type), building(weights, path):
            self.add_lora(config, name)
            self._fill_adapter(name, weights, folder / WEIGHTS)
        if not is_trainable:
            set_adapter(self.backbone, name, inference_mode=True)

    def _fill_adapter(self, name: str, weights: dict[str, Tensor], path: Path) -> None:
        """Put weights from a file into an adapter.

        Raises:
            ValueError: if they are not all of the adapter's, or others.
        """
        needed = get_peft_model_state_dict(
            self.backbone, adapter_name=name, save_embedding_layers=False
        )
        missing = sorted(needed.keys() - weights.keys())
        if missing:
            raise ValueError(
                f"{path.name} beside it lacks {missing[0]}; it is no adapter of this backbone."
            )
        wrong: Any = set_peft_model_state_dict(self.backbone, dict(weights), adapter_name=name)
        if wrong.unexpected_keys:
            foreign = wrong.unexpected_keys[0]
            raise ValueError(f"{path.name} beside it holds {foreign}, which is not the adapter's.")

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
