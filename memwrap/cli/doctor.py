"""What is installed, what will be used, and whether a model can be given a memory."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch
from packaging.version import Version
from transformers import AutoConfig

import memwrap
from memwrap import ops
from memwrap.assets import ROOT
from memwrap.assets.places import find_model
from memwrap.cli.small_models import small_model
from memwrap.cli.trying import QUICK, Trial, builder, try_memory
from memwrap.memories.registry import installed
from memwrap.model.configuration import MemoryModelConfig
from memwrap.ops import fla

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "trl", "safetensors", "triton", "datasets",
    "pypdf", "beautifulsoup4", "bitsandbytes",
)  # fmt: skip
_MISSING = "not installed"
# The versions that the tests run with: beside the shipped models, or in a checkout.
_PINS = (ROOT / "constraints.txt", Path(memwrap.__file__).parents[1] / "constraints.txt")


def versions() -> dict[str, str]:
    """List versions of what memwrap uses ("not installed" for what is optional and missing), and
    which packages bring memories."""
    by_package = {"memwrap": memwrap.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            by_package[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            by_package[package] = _MISSING
    for point in installed():
        if point.dist:
            by_package[f"memory {point.name}"] = f"{point.dist.name} {point.dist.version}"
    return by_package


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


def compared(by_package: dict[str, str]) -> str:
    """Compare versions with the tested ones; other versions are a note, for they may well work.

    Args:
        by_package: of `versions`; what is not installed or not tested is left out.

    Returns:
        One line.
    """
    pins = tested()
    others: dict[str, list[str]] = {"newer": [], "older": []}
    for name in (n for n, v in by_package.items() if n in pins and v != _MISSING):
        have, pin = Version(Version(by_package[name]).public), Version(pins[name])  # without "+cpu"
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
        config = AutoConfig.from_pretrained(find_model(name))
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The config of {name!r} cannot be loaded: {reason}") from error
    note = ""
    if config.model_type == "memwrap":
        note, config = growth_note(config), config.backbone
    text = config.get_text_config(decoder=True)
    about = (
        f"{config.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}, "
        f"vocabulary {text.vocab_size}{note}"
    )
    build = builder(lambda: small_model(config))
    build()
    return about, [try_memory(memory, build, QUICK) for memory in memwrap.available()]


def growth_note(config: MemoryModelConfig) -> str:
    """Say which memories of a saved model sum without a bound; "" for none that was trained."""
    notes = ""
    for values in config.memories or []:
        norms = (config.trained_norms or {}).get(values["name"], {})
        if norms and values.get("state_decay", 1) == 1 and values.get("read_cap") is None:
            layer = max(norms, key=norms.__getitem__)
            notes += (
                f"\nwarning: nothing bounds what {values['name']!r} sums (at most "
                f"{norms[layer]:.4g}, in layer {layer}, in training): see how far it grows with "
                "`memwrap eval`, and give memory.state_decay if it does"
            )
    return notes


__all__ = [
    "backends", "compared", "devices", "growth_note", "tested", "try_model", "versions",
]  # fmt: skip
