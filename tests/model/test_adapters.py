"""Several adapters in a backbone: which are in use comes back, and a state knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import error_of, ids, wrapped

pytestmark = [  # PEFT asks so of each base, and advises against short names
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter . was active:UserWarning"),
]


def lora(rank: int = 4, **settings: Any) -> LoraConfig:
    given = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **settings}
    return LoraConfig(r=rank, **given)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    return folder


def two(base: Path, **settings: Any) -> Any:
    """A PEFT model with the adapters a and b, which adapt other modules too."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), lora(**settings), adapter_name="a"
    )
    model.add_adapter("b", lora(6, target_modules=["q_proj", "o_proj"], **settings))
    return model.eval()


def scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 0.5)


def one_layer_apart(model: Any) -> None:
    model.set_adapter("a")
    model.base_model.model.model.layers[1].self_attn.q_proj.set_adapter("b")


STATES: dict[str, Any] = {
    "a": lambda p: p.set_adapter("a"),
    "b": lambda p: p.set_adapter("b"),
    "both": lambda p: p.base_model.set_adapter(["a", "b"]),
    "a merged": lambda p: p.merge_adapter(["a"]),
    "both merged": lambda p: p.merge_adapter(["a", "b"]),
    "disabled": lambda p: p.base_model.disable_adapter_layers(),
    "b disabled": lambda p: (p.set_adapter("b"), p.base_model.disable_adapter_layers()),
    "one layer apart": one_layer_apart,
    "scaled": scaled,
}


@pytest.mark.parametrize("name", STATES)
def test_adapters_come_back_as_they_were(name: str, base: Path, tmp_path: Path) -> None:
    text, model = ids(2, 20), two(base)
    STATES[name](model)
    held = wrapped("rmt", base=model)
    want = held(text).logits
    held.save_pretrained(tmp_path)
    again = memwrap.load(tmp_path)
    assert torch.equal(again(text).logits, want)
    assert again.config.base_included == ("merged" in name)
    for _, layer in held.backbone.named_modules():
        if hasattr(layer, "merged_adapters"):
            other = again.backbone.get_submodule(_)
            for part in ("active_adapters", "merged_adapters", "_disable_adapters"):
                assert getattr(other, part) == getattr(layer, part), (_, part)
    # Merging came after wrapping, too, and can be undone in what was loaded.
    if "merged" in name:
        for loaded in (held, again):
            for _, layer in loaded.backbone.named_modules():
                if getattr(layer, "merged", False):
                    layer.unmerge()
        assert error_of(again(text).logits, held(text).logits) < 1e-6
    if name in ("a", "b"):  # PEFT's own way of the same
        model.save_pretrained(tmp_path / "peft")
        fresh = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft" / name, adapter_name=name
        )
        assert error_of(wrapped("rmt", base=fresh.eval())(text).logits, want) < 1e-6


def test_merging_after_wrapping_saves_the_weights(base: Path, tmp_path: Path) -> None:
    text, model = ids(2, 20), two(base)
    held = wrapped("rmt", base=model)
    plain = held(text).logits
    model.merge_adapter(["a"])
    assert error_of(held(text).logits, plain) < 1e-4
    with pytest.raises(ValueError, match="leave include_base out"):
        held.save_pretrained(tmp_path / "no", include_base=False)
    held.save_pretrained(tmp_path / "yes")
    assert torch.equal(memwrap.load(tmp_path / "yes")(text).logits, held(text).logits)
    dora = wrapped("rmt", base=two(base, use_dora=True))
    for module in dora.backbone.modules():
        if hasattr(module, "merge"):
            module.merge()
    with pytest.raises(ValueError, match="unmerge it"):
        dora.save_pretrained(tmp_path / "dora")


def test_a_state_knows_the_adapters_it_was_read_with(base: Path, tmp_path: Path) -> None:
    model = two(base)
    held, text, question = wrapped("armt", base=model), ids(1, 20), ids(1, 4, seed=2)
    held.set_adapter("a")
    state, file = held.read(text), tmp_path / "state.safetensors"
    state.save(file)
    want = held(question, cache=state.clone()).logits
    for change in (
        lambda: held.set_adapter("b"),
        lambda: model.set_adapter("b"),
        lambda: held.set_adapter(["a", "b"]),
        lambda: held.disable_adapters(),
        lambda: one_layer_apart(model),
        lambda: scaled(model),
    ):
        held.enable_adapters()
        held.set_adapter("a")
        change()
        with pytest.raises(ValueError, match="read with the adapters"):
            held(question, cache=state.clone())
        with pytest.raises(ValueError, match="read with the adapters"):
            memwrap.MemoryState.load(file, held)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("a", 1.0)
    # Adapters that nothing depends on change nothing; a merged one is in use as an active one is.
    held.enable_adapters()
    held.set_adapter("a")
    held.add_lora(lora(), "c")
    held.set_adapter("a")
    got = held(question, cache=memwrap.MemoryState.load(file, held)).logits
    assert torch.equal(got, want)
    held.delete_adapter("c")
    assert torch.equal(held(question, cache=state.clone()).logits, want)
    held.delete_adapter("b")
    held.add_lora(lora(3), "b")
    held.set_adapter("a")
    with torch.no_grad():
        layer: Any = held.backbone.get_decoder().layers[0].self_attn.q_proj
        layer.lora_B["a"].weight.add_(0.1)
    with pytest.raises(ValueError, match="other weights"):
        memwrap.MemoryState.load(file, held)


def test_the_methods_of_transformers_see_the_same_adapters(base: Path, tmp_path: Path) -> None:
    text, model = ids(2, 20), wrapped("rmt", base=AutoModelForCausalLM.from_pretrained(base))
    plain = model(text).logits
    for call in (model.active_adapters, model.disable_adapters, model.enable_adapters):
        with pytest.raises(ValueError, match="no adapter"):
            call()
    model.add_lora(lora(), "a")
    with_a = model(text).logits
    model.add_adapter(lora(6), "b")
    with_b = model(text).logits
    assert model.active_adapters() == ["b"] and list(model.adapters()) == ["a", "b"]
    assert all(p.requires_grad for p in model.memory_parameters())
    model.set_adapter("a")
    assert torch.equal(model(text).logits, with_a) and error_of(with_b, with_a) > 1e-2
    model.disable_adapters()
    assert torch.equal(model(text).logits, plain)
    model.enable_adapters()
    assert torch.equal(model(text).logits, with_a)
    for wrong in ("c", ["a", "c"], []):
        with pytest.raises(ValueError, match=r"There is no adapter 'c'|at least one"):
            model.set_adapter(wrong)
    with pytest.raises(ValueError, match="already"):
        model.add_lora(lora(), "a")
    with pytest.raises(ValueError):  # nothing half done
        model.add_lora(LoraConfig(target_modules=["nowhere"]), "d")
    assert list(model.adapters()) == ["a", "b"] and torch.equal(model(text).logits, with_a)
    with pytest.raises(ValueError, match="set_adapter"):
        model.enable_peft_hotswap()
    # PEFT's own files, both ways.
    reference: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    weights = model.get_adapter_state_dict("a")
    peft.set_peft_model_state_dict(
        reference, {f"base_model.model.{k}": v for k, v in weights.items()}
    )
    reference.eval().save_pretrained(tmp_path)
    assert error_of(wrapped("rmt", base=reference)(text).logits, with_a) < 1e-6
    model.delete_adapter(["a", "b"])
    assert not model.adapters() and torch.equal(model(text).logits, plain)
    model.load_adapter(tmp_path, "again")
    assert error_of(model(text).logits, with_a) < 1e-6
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert memwrap.unwrap(model) is model.backbone


def test_a_peft_model_that_was_wrapped_sees_new_adapters(base: Path) -> None:
    model = two(base)
    held, text = wrapped("rmt", base=model), ids(2, 20)
    held.add_lora(lora(2), "c")
    with_c = held(text).logits
    model.set_adapter("a")
    assert held.active_adapters() == ["a"] and error_of(held(text).logits, with_c) > 1e-2
    model.set_adapter("c")
    assert torch.equal(held(text).logits, with_c)


def test_a_foreign_state_of_adapters_is_refused(base: Path, tmp_path: Path) -> None:
    held = wrapped("rmt", base=two(base))
    held.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values.pop("sealed")
    for wrong in (
        {"active": ["z"]},
        {"active": "a"},
        {"active": ["a"], "layers": {"lm_head": {"active": ["a"]}}},
        {"active": ["a"], "layers": ["x"]},
        {"active": ["a"], "merged": ["a"]},
        {"active": [["a"]]},
    ):
        path.write_text(json.dumps({**values, "adapter_switches": wrong}))
        with pytest.raises(ValueError, match=r"adapters|merged"):
            memwrap.load(tmp_path)
