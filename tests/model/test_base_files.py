"""A base that was changed before it was wrapped: its weights are nowhere else, and are saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.backbones.vocabulary import extend
from memwrap.model import base_files
from memwrap.testing.families import build
from memwrap.testing.helpers import ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is:FutureWarning")


def merged(model: Any) -> Any:
    """The base with LoRA merged into its weights and taken out again."""
    settings = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    held: Any = peft.get_peft_model(model, settings)
    return held.merge_and_unload().eval()


@torch.no_grad()
def trained(model: Any) -> Any:
    """The base with one norm moved a little."""
    model.get_decoder().norm.weight.mul_(1.1)
    return model


def resized(model: Any, size: int) -> Any:
    """The base with embeddings of another size, new ones drawn at random."""
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "merged": (merged, True),
    "trained": (trained, True),
    "cast and back": (lambda m: m.bfloat16().float(), True),
    "cast": (lambda m: m.bfloat16(), False),
    "as it was": (lambda m: m, False),
    "other rows": (lambda m: resized(m, 135), True),
    "fewer rows": (lambda m: resized(m, 120), True),
    "mean rows": (lambda m: extend(m, 135) or m, False),
}


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_nowhere_else_are_saved(name: str, shards: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base", max_shard_size=shards)
    change, differs = CHANGES[name]
    base = change(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model, text = wrapped("armt", base=base), ids(2, 20).clamp(max=119)
    model.save_pretrained(tmp_path / "model")
    again = memwrap.load(tmp_path / "model")
    assert again.config.base_included == differs
    if "cast" not in name:  # which rounds the rotations' frequencies, too, in no file
        assert torch.equal(again(text).logits, model(text).logits)


def test_of_large_tensors_rows_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_files, "_WHOLE", 8)
    build("llama").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not base_files.differs_from_files(base)
    assert base_files.differs_from_files(merged(base))


def test_what_cannot_be_compared_does_not_differ(tmp_path: Path) -> None:
    base = build("llama")
    for name in ("", "somebody/unheard-of", "no/such/place", str(tmp_path)):
        base.config._name_or_path = name
        assert not base_files.differs_from_files(base)
    base.config._name_or_path = str(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": {"lm_head.weight": "../model.safetensors"}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert not base_files.differs_from_files(base)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert not base_files.differs_from_files(base)
