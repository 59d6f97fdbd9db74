"""Conformance of PEFT's prefixes (prefix tuning, cartridges): the same logits, in and out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from cases import Case, Tolerances, both_precisions, compare, names_of, read_case
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import memwrap

TOLERANCES = Tolerances(reference={"": 1e-5}, float32={"": 2e-5})


def check(case: Case) -> None:
    settings, tensors = case.settings, case.tensors
    case.aside("seed")
    config = AutoConfig.for_model(
        settings["model_type"], **dict(settings["config"].items()),
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
    )  # fmt: skip
    settings["config"].used |= settings["config"].keys()
    base = AutoModelForCausalLM.from_config(config).to(case.dtype).eval()
    missing = base.load_state_dict(case.starting("base."), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    ids = tensors["input_ids"]
    with torch.no_grad():
        alone = base(ids).logits
    count, adapter = settings["num_virtual_tokens"], dict(settings["adapter"].items())
    settings["adapter"].used |= adapter.keys()
    model = memwrap.wrap(base, "compact", memory_size=None)
    with tempfile.TemporaryDirectory() as name:
        given, made = Path(name, "given"), Path(name, "made")
        given.mkdir()
        known = {"peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads",
                 "num_layers", "prefix_projection", "num_frozen_tokens"}  # fmt: skip
        assert adapter.keys() <= known, f"{adapter.keys() - known} are not understood"
        (given / "adapter_config.json").write_text(json.dumps(adapter))
        prefix = tensors["prompt_embeddings"]
        save_file({"prompt_embeddings": prefix}, given / "adapter_model.safetensors")
        state = model.load_prefix(given)
        model.save_prefix(state, made, kind=adapter["peft_type"])
        written = load_file(made / "adapter_model.safetensors")["prompt_embeddings"]
        about = json.loads((made / "adapter_config.json").read_text())
    assert {n: about.get(n) for n in adapter} == adapter and about["num_virtual_tokens"] == count
    memory = model.memories["compact"]
    trees = state.memories["compact"]["layers"]
    rows = [memory.rows_of(n, trees[str(n)]).key[0].transpose(0, 1) for n in memory.chosen]
    with torch.no_grad():
        logits = model(ids, cache=state.repeat(len(ids))).logits
    got = {"logits": logits, "logits_base": alone, "un_rotated_keys": torch.stack(rows)}
    compare(case, {**got, "prompt_embeddings": written}, TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", names_of("peft_prefix"))
def test_case(name: str, dtype: torch.dtype) -> None:
    check(read_case("peft_prefix", name, dtype))
