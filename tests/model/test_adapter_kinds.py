"""Every kind of adapter that PEFT has: it comes back from a saved model, or is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.model.adapter_switches import COME_BACK
from memwrap.testing.families import build
from memwrap.testing.helpers import error_of, ids, tiny, wrapped

KINDS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# What they need beside the modules.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10}, "C3A": {"block_size": 8}, "FOURIERFT": {"n_frequency": 20},
    "BOFT": {"boft_block_size": 8}, "OFT": {"oft_block_size": 8, "r": 0}, "HRA": {"r": 4},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "GRALORA": {"r": 4, "gralora_k": 2}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4}, "ROAD": {"group_size": 8}, "SHIRA": {"r": 2}, "WAVEFT": {"n_frequency": 20},
    "TRAINABLE_TOKENS": {"token_indices": [5, 9], "target_modules": ["embed_tokens"]},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2}, "VERA": {"r": 4},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2},
}  # fmt: skip
# Tensors shared by all layers and kept outside of them, or regenerated from the weights, or (LILY)
# what a token is given depends on the other tokens of the call.
REFUSED = {
    "ADAMSS", "FROD", "LILY", "OSF", "POLY", "PVERA", "TINYLORA", "UNILORA", "VBLORA", "VERA",
}  # fmt: skip
# Outside the backbone: virtual tokens, experts that call the model again, a second model.
OUTSIDE = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
}  # fmt: skip


def test_every_kind_of_adapter_is_decided() -> None:
    undecided = KINDS.keys() - COME_BACK - REFUSED - OUTSIDE
    assert not undecided, f"decide: does a saved model come back with {sorted(undecided)}?"
    assert not COME_BACK & (REFUSED | OUTSIDE)
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if getattr(tuner, "uses_shared_state", False):
            assert kind.value in REFUSED | OUTSIDE, kind


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


def adapted(base: Path, kind: str, **settings: Any) -> Any:
    """A saved base with an adapter of the kind in it, its weights random."""
    given = {"target_modules": ["q_proj", "o_proj"], **NEEDS.get(kind, {}), **settings}
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), KINDS[kind](**given)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # each kind has advice of its own
@pytest.mark.parametrize("kind", sorted(COME_BACK & KINDS.keys()))
def test_a_kind_comes_back(kind: str, base: Path, tmp_path: Path) -> None:
    text = ids(2, 20)
    model = wrapped("rmt", base=adapted(base, kind))
    want = model(text).logits
    plain = wrapped("rmt", base=AutoModelForCausalLM.from_pretrained(base))
    assert error_of(plain(text).logits, want) > 1e-2, "the adapter does not matter"
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # what is drawn again must come from a seed of its own
    again = memwrap.load(tmp_path)
    assert not again.config.base_included
    assert error_of(again(text).logits, want) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(REFUSED & KINDS.keys()))
def test_a_kind_is_refused_when_wrapped(kind: str, base: Path) -> None:
    with pytest.raises(ValueError, match=f"kind {kind} would not come back"):
        memwrap.wrap(adapted(base, kind), tiny("rmt"))
    model = wrapped("rmt")
    with pytest.raises(ValueError, match=f"kind {kind} would not come back"):
        model.add_lora(KINDS[kind](target_modules=["q_proj"], **NEEDS.get(kind, {})))
    assert not model.adapters()


@pytest.mark.filterwarnings("ignore")
def test_fields_that_do_not_come_back_are_refused(base: Path) -> None:
    for given in (
        {"layer_replication": [[0, 2], [0, 2]]},
        {"alora_invocation_tokens": [5, 6]},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(given))}` would not come back"):
            memwrap.wrap(adapted(base, "LORA", task_type="CAUSAL_LM", **given), tiny("rmt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "given",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 6]},
        {"target_parameters": ["mlp.down_proj.weight"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"layers_to_transform": [1]},
    ],
    ids=lambda given: "-".join(map(str, next(iter(given.items())))),
)
def test_lora_comes_back(given: dict[str, Any], base: Path, tmp_path: Path) -> None:
    text = ids(2, 20)
    model = wrapped("rmt", base=adapted(base, "LORA", **given))
    want = model(text).logits
    model.save_pretrained(tmp_path)
    again = memwrap.load(tmp_path)
    assert error_of(again(text).logits, want) < 1e-6
    begins_by_changing = given.get("init_lora_weights") in ("pissa", "olora")
    assert again.config.base_included == begins_by_changing


@pytest.mark.filterwarnings("ignore")
def test_biases_of_the_base_that_were_trained_come_back(tmp_path: Path) -> None:
    build("qwen2").save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", "LORA", bias="lora_only", target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.5 if name.endswith("bias") else 0)
    held = wrapped("rmt", base=model)
    want = held(ids(2, 20)).logits
    held.save_pretrained(tmp_path / "model")
    assert torch.equal(memwrap.load(tmp_path / "model")(ids(2, 20)).logits, want)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_tied_embeddings_come_back(tmp_path: Path) -> None:
    base = build("llama", tie_word_embeddings=True)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    settings = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5, 9])
    model: Any = peft.get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        parameter.data.add_(1.0 if "token_adapter" in name else 0)
    held = wrapped("rmt", base=model)
    want = held(ids(2, 20)).logits
    held.save_pretrained(tmp_path, include_base=True)
    assert torch.equal(memwrap.load(tmp_path)(ids(2, 20)).logits, want)
