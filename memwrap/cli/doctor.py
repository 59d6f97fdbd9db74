"""What is installed, what will be used, and whether a model can be given a memory."""

from __future__ import annotations

import copy
import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import memwrap
from memwrap import ops
from memwrap.assets import ROOT, asset
from memwrap.backbones.masks import ATTENDING
from memwrap.memories.registry import installed
from memwrap.ops import fla

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "trl", "safetensors", "triton", "datasets",
    "pypdf", "beautifulsoup4", "bitsandbytes",
)  # fmt: skip
_MISSING = "not installed"
# The versions that the tests run with: beside the shipped models, or in a checkout.
_PINS = (ROOT / "constraints.txt", Path(memwrap.__file__).parents[1] / "constraints.txt")
# Of a model that is built only to be tried. Names that a config lacks are left out.
_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 8, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2, "n_group": 1,
    "topk_group": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_VOCABULARY = 256


@dataclass(frozen=True)
class Trial:
    """The result of trying a memory with a model: `problem` is empty if it works."""

    memory: str
    problem: str = ""


def versions() -> dict[str, str]:
    """List versions of what memwrap uses ("not installed" for what is optional and missing), and
    which packages bring memories."""
    found = {"memwrap": memwrap.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = _MISSING
    for point in installed():
        if point.dist:
            found[f"memory {point.name}"] = f"{point.dist.name} {point.dist.version}"
    return found


def tested() -> dict[str, str]:
    """Read the version of each package that the tests run with (constraints.txt).

    Raises:
        FileNotFoundError: if the file was not installed with memwrap.
    """
    path = next((path for path in _PINS if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{_PINS[0]} is missing; install memwrap again.")
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and line[0] != "#")


def compared(found: dict[str, str]) -> str:
    """Compare versions with the tested ones; other versions are a note, for they may well work.

    Args:
        found: of `versions`; what is not installed or not tested is left out.

    Returns:
        One line.
    """
    pins = tested()
    others: dict[str, list[str]] = {"newer": [], "older": []}
    for name in (n for n, v in found.items() if n in pins and v != _MISSING):
        have, pin = Version(Version(found[name]).public), Version(pins[name])  # without "+cpu"
        if have != pin:
            others["newer" if have > pin else "older"].append(f"{name} {have} ({pin})")
    notes = [f"{age} than tested: {', '.join(names)}" for age, names in others.items() if names]
    return f"note: {'; '.join(notes)}" if notes else "as tested"


def devices() -> list[str]:
    """Describe each device in a line."""
    lines = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        lines.append(f"cuda:{index}: {about.name}, {about.total_memory / 2**30:.0f} GiB, {bf16}")
    if torch.backends.mps.is_available():
        lines.append("mps")
    return lines


def backends() -> str:
    """Tell which implementation of the memories' mathematics runs here."""
    try:
        with ops.backend("triton"):
            kernels = "Triton kernels on GPU tensors"
    except ValueError as error:
        kernels = str(error)
    if torch.cuda.is_available() and not fla.problem():
        kernels = f"flash-linear-attention where it has the op, else {kernels}"
    return f"{ops.current_backend()} ({kernels})"


def try_model(name: str) -> tuple[str, list[Trial]]:
    """Try every memory on a small random model of the same architecture.

    Args:
        name: a folder, the name of a shipped model or a repo id on the Hub; only its config is
            loaded.

    Returns:
        A description of the architecture, and a `Trial` for every memory.

    Raises:
        ValueError: if there is no such config, or no small model can be built of it.
    """
    try:
        config = AutoConfig.from_pretrained(asset(name) or name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The config of {name!r} cannot be loaded: {reason}") from error
    if config.model_type == "memwrap":
        config = config.backbone
    text = config.get_text_config(decoder=True)
    about = (
        f"{config.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"vocabulary {text.vocab_size}"
    )
    return about, [_try(name, config, memory) for memory in memwrap.available()]


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a random model of the config's architecture with two layers (and one of every kind that
    does not attend), narrow if it can be.

    Raises:
        ValueError: if none can be built; says what the architecture complained of.
    """
    problem = ""
    for widths in (_SMALL, {}):
        try:
            model = AutoModelForCausalLM.from_config(_reduced(config, widths), dtype=torch.float32)
            with torch.no_grad():
                model(torch.ones(1, 4, dtype=torch.long))
            return model.eval()
        except Exception as error:  # whatever a foreign architecture raises is a "no"
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    raise ValueError(f"No small {config.model_type!r} model can be built: {problem}")


def _reduced(config: PreTrainedConfig, widths: dict[str, Any]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    before, kinds = text.num_hidden_layers, getattr(text, "layer_types", None)
    layers = min(2, before)
    if kinds and not isinstance(getattr(type(text), "layer_types", None), property):
        text.layer_types = _one_of_each(kinds)
        layers = len(text.layer_types)
    for key, value in list(vars(text).items()):  # what else is said of every layer
        if key != "layer_types" and isinstance(value, list) and len(value) == before:
            setattr(text, key, value[-layers:])
    text.num_hidden_layers = layers
    for key, value in {**widths, "vocab_size": _VOCABULARY}.items():
        if getattr(text, key, None) is not None:
            setattr(text, key, value)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for owner in (config, text):
            if getattr(owner, key, None) is not None:
                setattr(owner, key, 0)
    return config


def _one_of_each(kinds: list[str]) -> list[str]:
    """List layers of every kind among `kinds`, two that attend first: tiny memories name these."""
    attending = [kind for kind in kinds if kind in ATTENDING]
    others = [kind for kind in kinds if kind not in ATTENDING]
    second = next((kind for kind in attending if kind != attending[0]), None)
    first = [attending[0], second or attending[0]] if attending else []
    return (first + list(dict.fromkeys(others)))[: len(kinds)]


def _try(name: str, config: PreTrainedConfig, memory: str) -> Trial:
    """Wrap, read over three segments, and train one step."""
    ids = torch.randint(1, _VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    try:
        model = memwrap.wrap(small_model(config), memwrap.config_class(memory).tiny())
        model.read(ids)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    except Exception as error:  # see `small_model`
        return Trial(memory, " ".join(str(error).split())[:400] or type(error).__name__)
    return Trial(memory)


__all__ = [
    "Trial", "backends", "compared", "devices", "small_model", "tested", "try_model", "versions",
]  # fmt: skip
