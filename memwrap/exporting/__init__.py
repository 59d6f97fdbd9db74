"""Self-contained checkpoints: weights, code and card in one folder that needs no memwrap."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memwrap.backbones.auto_classes import brings_code
from memwrap.exporting.card import card, foreign_packages
from memwrap.exporting.flat import flat_files
from memwrap.io.version import VERSION
from memwrap.io.whole_folders import making
from memwrap.model.adapter_switches import adapter_keys
from memwrap.model.base_files import plain_name
from memwrap.model.memory_model import MemoryModelForCausalLM
from memwrap.model.weight_files import seal, write_model

TOLERANCE = 1e-4  # of the logits' scale, in float32; half types round more
TOLERANCES = {torch.float32: TOLERANCE, torch.float64: TOLERANCE}


@dataclass
class Checked:
    """The findings of a fresh process without memwrap.

    Attributes:
        difference: largest difference of the logits, as a share of their scale.
        generates: whether it generated the same ids.
    """

    difference: float
    generates: bool


def export(
    model: MemoryModelForCausalLM,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    about: dict[str, Any] | None = None,
    check: bool = True,
) -> Checked | None:
    """Write a checkpoint that loads without memwrap.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs torch and
    transformers; `memwrap.load(folder)` works too. Adapters are merged into the backbone's
    weights. The code is memwrap's own and that of the packages that bring the memories, cut to what
    the model imports, in flat files.

    Args:
        model: a memwrap model.
        folder: a new or empty folder. Files appear whole or not at all.
        tokenizer: saved beside the model, if given.
        about: for the card: `licence`, `data`, `tokens`, `results` (Markdown) and `notes`.
        check: load the result in a fresh process where neither memwrap nor these packages can be
            imported, and compare logits and generated ids.

    Returns:
        What the check found; None without one.

    Raises:
        ValueError: if the folder holds files, an adapter cannot be merged, a memory's code needs
            packages that transformers does not bring, the base brings code of its own, or the check
            fails.
    """
    if brings_code(model.backbone):
        raise ValueError(
            f"{type(model.backbone).__name__} brings code of its own, which an exported model "
            "would have to run beside memwrap's; save it (save_pretrained) instead of exporting it."
        )
    folder = Path(folder)
    with making(folder) as new:
        _write(model, new, tokenizer, about or {}, folder.name)
        return _checked(model, new) if check else None


def push(folder: str | Path, repo_id: str, token: str | None = None) -> Any:
    """Upload an exported folder through `huggingface_hub`."""
    api = huggingface_hub.HfApi(token=token)
    api.create_repo(repo_id, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder)


def _write(
    model: MemoryModelForCausalLM, folder: Path, tokenizer: Any, about: dict[str, Any], name: str
) -> None:
    config = copy.deepcopy(model.config)
    config.base_included, config.memwrap_version, config.adapters = True, VERSION, None
    config.adapter_switches = None
    config.backbone.dtype = model.backbone.dtype
    config.architectures = [type(model).__name__]
    config.auto_map = {
        "AutoConfig": "configuration_memwrap.MemoryModelConfig",
        "AutoModelForCausalLM": "modeling_memwrap.MemoryModelForCausalLM",
    }
    write_model(folder, merged(model), config, model.generation_config)
    seal(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    files = flat_files([type(memory).__module__ for memory in model.memories.values()]) | {
        "README.md": card(model, about, name, tokenizer=tokenizer is not None)
    }
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")


def merged(model: MemoryModelForCausalLM) -> dict[str, Tensor]:
    """Collect all weights of a model with its adapters merged, by the names they have without
    adapters.

    Raises:
        ValueError: for an adapter that cannot be merged into a weight, or is not on in all passes.
    """
    tensors = {
        f"memory_modules.{name}.{key}": value
        for name, memory in model.memories.items()
        for key, value in memory.state_dict().items()
    }
    added = adapter_keys(model.backbone)
    for name, memory in model.memories.items():
        if added and getattr(memory, "frozen_reader", False):
            raise ValueError(
                f"{name!r} writes with the adapters and reads without them; merged into the "
                "weights they would be in both. Save it (save_pretrained) instead."
            )
    for key, value in model.backbone.state_dict().items():
        if key not in added:
            tensors[f"backbone.{plain_name(key)}"] = value
    for name, module in model.backbone.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, value in (
                module.modules_to_save[module.active_adapters[0]].state_dict().items()
            ):
                tensors[f"backbone.{plain_name(name)}.{key}"] = value
        if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
            continue
        if name.endswith(".base_layer"):  # merged with the adapter that it stands in
            continue
        layer: Any = copy.deepcopy(module)
        try:
            while isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)
                layer = layer.base_layer  # type: ignore[attr-defined]
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise ValueError(f"The adapter of {name} cannot be merged: {error}") from error
        for key, value in layer.state_dict().items():
            tensors[f"backbone.{plain_name(f'{name}.base_layer.{key}')}"] = value
    return tensors


def _checked(model: MemoryModelForCausalLM, folder: Path) -> Checked:
    """Run the check in a fresh process.

    Raises:
        ValueError: if it fails, with its last line.
    """
    sample = torch.randint(
        0, model.config.vocab_size, (1, 2 * model.segment_size + 3),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with _evaluating(model), torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        device = model.device
        logits = model(input_ids=sample.to(device)).logits.float().cpu()
        prompt = sample[:, :8].to(device)
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8,
            do_sample=False, pad_token_id=0,
        ).cpu()  # fmt: skip
        expected = Path(scratch) / "expected.safetensors"
        save_file({"ids": sample, "logits": logits, "generated": generated}, expected)
        script = Path(__file__).with_name("check.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        arguments = [script, folder.resolve(), expected, *foreign_packages(model)]
        run = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment, capture_output=True, text=True, check=False, cwd=scratch,
        )  # fmt: skip
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"The exported checkpoint does not load without memwrap: {last}")
    values = json.loads(run.stdout.strip().splitlines()[-1])
    result = Checked(values["difference"] / max(values["scale"], 1e-30), values["generates"])
    limit = TOLERANCES.get(model.backbone.dtype, 0.05)
    if not values["clean"] or not result.difference <= limit:
        raise ValueError(
            f"The exported checkpoint gives other logits: {result.difference:.1e} of their scale, "
            f"allowed {limit:.0e}."
        )
    return result


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


__all__ = ["Checked", "export", "merged", "push"]
