"""Adapters of PEFT's folders: whole and of this backbone, or refused with nothing left behind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import refused
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import error_of, ids, wrapped

pytestmark = [  # PEFT asks so of each base, and tells which adapter a layer goes back to
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active:UserWarning"),
]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXT = ids(2, 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(build("llama"), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def first(change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def edit(weights: dict[str, Tensor]) -> None:
        name = sorted(weights)[0]
        new = change(weights.pop(name))
        if new is not None:
            weights[name] = new

    return edit


WRONG_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a tensor too few": first(lambda t: None),
    "none": lambda w: w.clear(),
    "a tensor more": lambda w: w.update(strange=torch.ones(1)),
    "numbers that are not finite": first(lambda t: torch.full_like(t, torch.nan)),
    "another shape": first(lambda t: t[:, :3].contiguous()),
    "whole numbers": first(lambda t: t.long()),
}
WRONG_CONFIGS: dict[str, Any] = {
    "a rank without end": {"r": 10**9},
    "a pattern for ranks": {"rank_pattern": {"(a+)+$": 3}},
    "a base that it changed": {"init_lora_weights": "pissa"},
    "no kind of adapter": {"peft_type": "NONE"},
    "a module to import": {"megatron_config": {"a": 1}, "megatron_core": "os"},
    "text for a number": {"lora_alpha": "x"},
    "a list for a kind": {"peft_type": ["LORA"], "target_modules": "(a+)+$"},
}


def assert_refused(folder: Path) -> None:
    model = wrapped("rmt")
    for beside in (False, True):
        if beside:
            torch.manual_seed(3)
            model.add_lora(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "a")
        before, trained = model(TEXT).logits, [p.requires_grad for p in model.parameters()]
        start = time.process_time()
        with pytest.raises((ValueError, FileNotFoundError)):
            model.load_adapter(folder, "new")
        assert time.process_time() - start < 5
        assert list(model.adapters()) == ["a"] * beside
        assert torch.equal(model(TEXT).logits, before)
        assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize("what", WRONG_WEIGHTS)
def test_wrong_weights_of_an_adapter_are_refused(folder: Path, what: str) -> None:
    weights = load_file(folder / WEIGHTS)
    WRONG_WEIGHTS[what](weights)
    save_file(weights, folder / WEIGHTS)
    assert_refused(folder)


@pytest.mark.parametrize("what", WRONG_CONFIGS)
def test_a_wrong_config_of_an_adapter_is_refused(folder: Path, what: str) -> None:
    edit_config(folder, **WRONG_CONFIGS[what])
    assert_refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "", '{"peft_type": "LORA", "r": NaN}'])
def test_a_damaged_config_of_an_adapter_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    assert_refused(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_of_an_adapter_lie_in_its_folder(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / name)
    assert_refused(folder)
    (folder / name).symlink_to(tmp_path / name)
    assert_refused(folder)


def test_an_adapter_in_a_pickle_is_not_read(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert_refused(folder)


def test_a_pattern_for_modules_is_not_matched(folder: Path, tmp_path: Path) -> None:
    """The weights say which modules an adapter has, be the pattern one that never ends."""
    model = wrapped("rmt")
    model.load_adapter(folder)
    wanted = model(TEXT).logits
    shutil.copytree(folder, tmp_path / "outer" / "inner")
    pattern = "(a+)+$|([a-z_.]*)*[qv]_proj$"
    edit_config(tmp_path / "outer" / "inner", target_modules=pattern)
    again = wrapped("rmt")
    assert error_of(again(TEXT).logits, wanted) > 1e-2
    again.load_adapter(tmp_path / "outer", subfolder="inner")
    assert torch.equal(again(TEXT).logits, wanted)


def test_weights_that_a_narrow_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = wrapped("armt")
    with torch.no_grad():
        model.backbone.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path, include_base=True)
    with refused("float16 cannot", "wider dtype"):
        memwrap.load(tmp_path, dtype=torch.float16)
    assert memwrap.load(tmp_path, dtype=torch.bfloat16).backbone.dtype == torch.bfloat16
