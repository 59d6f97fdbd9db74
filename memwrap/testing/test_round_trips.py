"""Invariants 5 and 6: the neutral start, and everything that goes out and comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import memwrap
from memwrap.memories.protocol import LogitsMemory
from memwrap.memories.registry import memory_class
from memwrap.model.memory_model import MEMORY_CHILD
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    PEFT_EXPERTS,
    SEGMENT,
    assert_close,
    assert_memory_matters,
    assert_same_states,
    error_of,
    ids,
    padded,
    pairs,
    randomise,
    tiny,
    wrapped,
)

TEXT = ids(2, 2 * SEGMENT + 3)
# peft 0.21 asks a model by the name that transformers 5.23 has replaced.
PEFT_NAMES = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
# peft 0.20 says so of a base without a name.
PEFT_NAMELESS = pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")
# gpt2's Conv1D holds its weights turned; peft says that it has noticed.
PEFT_TURNED = pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")


@torch.no_grad()
def logits_of(model: Any, text: torch.Tensor = TEXT) -> torch.Tensor:
    return model(text).logits


@pairs("branches")
def test_neutral_start(memory: str, family: str) -> None:
    """With nothing remembered a segment gives what the base gives, if the method promises so."""
    base, model = build(family), wrapped(memory, family)
    text, mask = padded([ids(1, SEGMENT)[0], ids(1, 5, seed=1)[0]], "left")
    with torch.no_grad():
        want = base(text[:1]).logits[0]
        short = base(text[1:, 3:]).logits[0]
        long = base(TEXT).logits
        got = model(text, attention_mask=mask).logits
    if not memory_class(memory).claims.neutral_start:
        assert error_of(got[0], want) > 1e-2, f"{memory} has a neutral start but does not say so"
        return
    assert_close(got[0], want)
    assert_close(got[1, 3:], short)
    assert_memory_matters(model, ids(1, 2 * SEGMENT))
    fresh = memwrap.wrap(base, tiny(memory))
    assert_close(logits_of(fresh, text[:1])[0], want)
    whole = memory_class(memory).claims.whole
    if whole and fresh.parts.max_positions is None:  # learned positions begin anew
        base = memwrap.unwrap(fresh)
        seeing = memwrap.wrap(base, memory, segment_size=SEGMENT, **whole)
        assert_close(logits_of(seeing), long)


def facts(model: Any) -> dict[str, Any]:
    return {
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "parameters": {n: p.clone() for n, p in model.state_dict().items()},
        "trainable": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "forward": [n for n, m in model.named_modules() if "forward" in vars(m)],
    }


@pairs("places")
def test_unwrap_gives_the_base_back(memory: str, family: str) -> None:
    base = build(family)
    before = facts(base)
    with torch.no_grad():
        want = base(TEXT).logits
    model = wrapped(memory, base=base)
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in before["trainable"]]
    model.generate(TEXT[:, :5], max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model.backbone(TEXT).logits, want)  # wrapped, it still works alone
    model.train()
    model(TEXT, labels=TEXT).loss.backward()
    model.zero_grad()
    again = memwrap.unwrap(model.eval())
    assert again is base
    after = facts(base)
    for name, value in before.pop("parameters").items():
        assert torch.equal(after["parameters"][name], value), name
    assert after["parameters"].keys() == base.state_dict().keys()
    assert {k: after[k] for k in before} == before
    with torch.no_grad():
        assert torch.equal(base(TEXT).logits, want)
    assert_memory_matters(wrapped(memory, base=base), TEXT)  # and it can be wrapped again


@pairs("places")
def test_saved_and_loaded(memory: str, family: str, tmp_path: Path) -> None:
    model = wrapped(memory, family)
    want = logits_of(model)
    model.save_pretrained(tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    nbytes = sum(p.numel() * p.element_size() for p in model.memory_parameters())
    assert nbytes <= size < nbytes + 20_000, "the base was saved though nothing changed it"
    loaded = memwrap.load(tmp_path, build(family))
    assert not loaded.training
    assert [c.to_dict() for c in loaded.memory_configs] == [
        c.to_dict() for c in model.memory_configs
    ]
    assert torch.equal(logits_of(loaded), want)
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.long
@pairs()
def test_saved_with_its_base(memory: str, family: str, tmp_path: Path) -> None:
    model = wrapped(memory, family)
    want = logits_of(model)
    model.save_pretrained(tmp_path / "asked", include_base=True)
    assert torch.equal(logits_of(memwrap.load(tmp_path / "asked")), want)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "asked")
    assert isinstance(auto, memwrap.MemoryModelForCausalLM)
    assert torch.equal(logits_of(auto), want)
    with torch.no_grad():
        next(model.backbone.parameters()).mul_(1.01)
    want = logits_of(model)
    model.save_pretrained(tmp_path / "changed")  # unasked: the base is another one now
    loaded = memwrap.load(tmp_path / "changed")
    assert torch.equal(logits_of(loaded), want)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(memwrap.load(tmp_path / "again")), want)


@pytest.mark.long
@pairs()
def test_the_base_is_found_by_its_recorded_name(memory: str, family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = wrapped(memory, base=base)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(memwrap.load(tmp_path / "model")), logits_of(model))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(auto), logits_of(model))


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout)


def randomise_lora(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.long
@PEFT_NAMES
@PEFT_TURNED
@PEFT_EXPERTS
@pairs()
@pytest.mark.parametrize("order", ["inside", pytest.param("before", marks=pytest.mark.slow)])
def test_saved_and_loaded_with_lora(memory: str, family: str, order: str, tmp_path: Path) -> None:
    if order == "inside":
        model = wrapped(memory, family)
        plain = logits_of(model)
        model.add_lora(lora())
    else:
        plain = logits_of(wrapped(memory, family))
        adapted: Any = get_peft_model(build(family), lora())
        model = randomise(memwrap.wrap(adapted, tiny(memory))).eval()
    assert torch.equal(logits_of(model), plain)  # LoRA starts at zero
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith("memory_modules") for n in trainable)
    assert any("lora_" in n for n in trainable)
    assert all(p.requires_grad for p in model.memory_parameters())
    randomise_lora(model)
    want = logits_of(model)
    assert error_of(want, plain) > 1e-2
    model.save_pretrained(tmp_path)
    loaded = memwrap.load(tmp_path, build(family))
    assert torch.equal(logits_of(loaded), want)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(memwrap.load(tmp_path / "again", build(family))), want)


@pytest.mark.long
@PEFT_NAMES
@PEFT_NAMELESS
@PEFT_TURNED
@PEFT_EXPERTS
@pairs()
def test_peft_around_the_model(memory: str, family: str, tmp_path: Path) -> None:
    settings = LoraConfig(r=4, target_modules="all-linear", modules_to_save=[MEMORY_CHILD])
    outer = get_peft_model(wrapped(memory, family), settings)
    randomise_lora(outer)
    randomise(outer.get_base_model(), seed=11)
    outer.eval()
    want = logits_of(outer)
    assert error_of(want, logits_of(wrapped(memory, family))) > 1e-2
    outer.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(memwrap.wrap(build(family), tiny(memory)), tmp_path).eval()
    assert torch.equal(logits_of(loaded), want)


# Where a base has no state of its own the family says nothing about a file.
@pairs("places", families=("llama", "qwen3_next", "qwen3_5", "lfm2"))
def test_a_saved_state_continues(memory: str, family: str, tmp_path: Path) -> None:
    model = wrapped(memory, family)
    text, mask = padded([ids(1, 21)[0], ids(1, 11, seed=1)[0]], "left")
    state = model.read(text, mask)
    assert bool((state.fill > 0).all())  # an open segment is saved too
    path = tmp_path / "book.safetensors"
    state.save(path)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    tail = ids(2, 12, seed=4)
    with torch.no_grad():
        want = model(tail, cache=state.clone())
        for loaded in (memwrap.MemoryState.load(path), memwrap.MemoryState.load(path, model)):
            assert loaded.nbytes == state.nbytes and loaded.batch_size == 2
            assert_same_states(loaded, state, 0.0)
            got = model(tail, cache=loaded)
            assert torch.equal(got.logits, want.logits)
            assert_same_states(got.cache, want.cache, 0.0)


@pytest.mark.long
@pairs()
def test_a_state_goes_on_in_a_loaded_model(memory: str, family: str, tmp_path: Path) -> None:
    model = wrapped(memory, family)
    state = model.read(ids(1, 21))
    state.save(tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "model")
    loaded = memwrap.load(tmp_path / "model", build(family))
    again = memwrap.MemoryState.load(tmp_path / "state.safetensors", loaded)
    question = ids(1, 5, seed=4)
    got = loaded.generate(question, cache=again, max_new_tokens=9, do_sample=False)
    want = model.generate(question, cache=state, max_new_tokens=9, do_sample=False)
    assert torch.equal(got, want)


@pytest.mark.long
def test_a_bfloat16_model_comes_back(memory: str, tmp_path: Path) -> None:
    # Loaded rather than cast: `.to(bfloat16)` would also round the rotary table, no weight.
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = wrapped(memory, base=base)
    want = logits_of(model)
    model.save_pretrained(tmp_path, include_base=True)
    loaded = memwrap.load(tmp_path)
    assert next(loaded.backbone.parameters()).dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded), want)
    state = model.read(TEXT)
    state.save(tmp_path / "s.safetensors")
    again = memwrap.MemoryState.load(tmp_path / "s.safetensors", loaded)
    assert_same_states(again, state, 0.0)


def test_a_copy_is_another_model(memory: str) -> None:
    model = wrapped(memory)
    want, other = logits_of(model), copy.deepcopy(model)
    assert torch.equal(logits_of(other), want)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert torch.equal(logits_of(model), want) and error_of(logits_of(other), want) > 1e-2
    other.parts.decoder.register_forward_hook(lambda *_: pytest.fail("the copy was run"))
    logits_of(model)


def test_fingerprints_follow_the_weights(memory: str) -> None:
    model = wrapped(memory)
    seen = [model.fingerprint()]
    assert wrapped(memory).fingerprint() == seen[0]
    parameter, base = next(model.memory_parameters(), None), next(model.backbone.parameters())
    if parameter is not None:
        with torch.no_grad():
            parameter.add_(1.0)
        seen.append(model.fingerprint())
        parameter.data += 1.0  # as some optimizers and PEFT's merging do: no version is counted
        seen.append(model.fingerprint())
        assert len({f["memories"] for f in seen}) == 3, "the memory changed, not its fingerprint"
    assert len({f["backbone"] for f in seen}) == 1
    base.data += 1.0
    assert model.fingerprint()["backbone"] != seen[0]["backbone"]


@pytest.mark.long
def test_a_larger_vocabulary(memory: str, tmp_path: Path) -> None:
    model = wrapped(memory)
    want = logits_of(model)
    model.resize_token_embeddings(140, mean_resizing=False)
    assert model.config.vocab_size == 140 and logits_of(model).shape[-1] == 140
    # What is mixed into the distribution has a share of the whole vocabulary: with more words the
    # others' logits move wherever it has a part.
    mixes = any(isinstance(m, LogitsMemory) for m in model.memories.values())
    neutral = memory_class(memory).claims.neutral_start
    same = slice(SEGMENT * neutral) if mixes else slice(None)
    assert_close(logits_of(model)[:, same, :128], want[:, same])
    labels = torch.full_like(TEXT, 139)
    assert bool(model(TEXT, labels=labels).loss.isfinite())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(memwrap.load(tmp_path)), logits_of(model))


@pairs("places", families=("gemma3", "qwen2"))
def test_tied_embeddings_stay_tied(memory: str, family: str, tmp_path: Path) -> None:
    base = build(family, tie_word_embeddings=True)
    model = wrapped(memory, base=base)
    model.save_pretrained(tmp_path, include_base=True)
    loaded = memwrap.load(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits_of(loaded), logits_of(model))
