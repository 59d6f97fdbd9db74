"""The config of a wrapped model: its memories' settings and its backbone's config."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def _foreign(kind: str) -> type[PreTrainedConfig]:
    """Make the class of a config whose own comes with the base (`trust_remote_code`)."""
    return type("ForeignConfig", (PreTrainedConfig,), {"model_type": str(kind)})


def is_foreign(config: PreTrainedConfig) -> bool:
    """Tell whether a backbone's config is only held until its own class is loaded."""
    return config.model_type not in CONFIG_MAPPING


class MemoryModelConfig(PreTrainedConfig):
    """The configs of the memories and of the backbone.

    Attributes:
        memories: one dict a memory, with its `name`.
        backbone: the backbone's own config.
        base_model: name or path the backbone was loaded from ("" if unknown).
        base_mark: made by whoever saved the model, if `base_model` is a path (`io.own_paths`).
        base_fingerprint: which weights it had when it was wrapped.
        base_code: whether its class comes with it (`trust_remote_code`), even where transformers
            knows its `model_type`.
        base_included: whether its weights are saved beside the memory's.
        adapters: PEFT configs of the adapters inside the backbone, by adapter name.
        adapter_switches: which of them are active, switched off or merged.
        trained_norms: how large the states were at the end of training, at most
            (`model.state_norms`), by memory and layer.
        memwrap_version: who wrote this.
    """

    model_type = "memwrap"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    auto_map: ClassVar[dict] = {}  # trainers ask for it; no code is loaded with a model of memwrap

    memories: list | None = None
    backbone: Any = None
    base_model: str = ""
    base_mark: str = ""
    base_fingerprint: str = ""
    base_code: bool = False
    base_included: bool = False
    adapters: dict | None = None
    adapter_switches: dict | None = None
    trained_norms: dict | None = None
    memwrap_version: str = ""

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone, dict):
            values = dict(self.backbone)
            kind = values.pop("model_type")
            known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else _foreign(kind)
            self.backbone = known(**values)
        kwargs.pop("sealed", None)  # of a file (`weight_files.seal`), no setting
        self.tie_word_embeddings = False  # what the backbone ties it ties itself
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        return self if self.backbone is None else self.backbone.get_text_config(decoder=True)

    def _token(name: str) -> Any:  # type: ignore[misc]
        """Make a property of a special token, which is the backbone's."""

        def get(self: Any) -> Any:
            return getattr(self.get_text_config(), name, None)

        def put(self: Any, value: Any) -> None:
            if self.backbone is not None:
                setattr(self.get_text_config(), name, value)

        return property(get, put)

    pad_token_id, eos_token_id, bos_token_id = map(
        _token, ("pad_token_id", "eos_token_id", "bos_token_id")
    )

    @property
    def vocab_size(self) -> int:
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.get_text_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.get_text_config().num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.get_text_config().num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """Text of any length is read; tools that ask for a limit get one beyond any text."""
        return 2**30
