"""Conformance of RMT: every reference case in the folder, through the public classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    Case,
    backbone_of,
    compare,
    generated_by,
    logits_of,
    names_of,
    read_case,
    settings_of,
    shift_labels_of,
    states_by_segment,
)
from torch import Tensor
from transformers import LlamaForCausalLM

import memwrap
from memwrap.engine.plan import segment_lengths
from memwrap.testing.families import CONFIGS

TOLERANCES = {"out.": 2e-5, "grad.": 1e-5}


class PublishedTruncation(memwrap.RMTConfig):
    """The published rule: the edge after segment s is cut iff `s >= 1` and
    `s + bptt_segments <= max_n_segments`. memwrap cuts every `bptt_segments` segments."""

    def __init__(self, most: int, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self.most = most

    def detach_before(self, segment: int) -> bool:
        done = segment - 1
        return done >= 1 and done + self.bptt_segments <= self.most


def model_of(case: Case) -> Any:
    settings = settings_of(case)
    if case.settings.get("k2", -1) not in (-1, None):
        settings["bptt_segments"] = case.settings["k2"]
    model = memwrap.wrap(backbone_of(case), memwrap.RMTConfig(**settings))
    if "bptt_segments" in settings:
        model.memory_configs = [PublishedTruncation(case.settings["max_n_segments"], settings)]
    with torch.no_grad():
        model.memories["rmt"].tokens.copy_(case.tensors["memory"])
    return model.eval()


def run_split(case: Case) -> dict[str, Tensor]:
    case.known("T", "segment_size")
    total, size = case.settings["T"], case.settings["segment_size"]
    assert case.tensors["input_ids"].shape[1] == total
    prefix = "out.segment_lengths_"
    return {
        name: torch.tensor(segment_lengths(total, size, name[len(prefix) :]))
        for name in case.expected
        if name.startswith(prefix)
    }


def run_layout(case: Case) -> dict[str, Tensor]:
    """What the backbone's decoder is given: embeddings, and who is visible as a key."""
    case.known("B", "L", "num_mem_tokens")
    ids, mask = case.tensors["input_ids"], case.tensors["attention_mask"]
    length, m = case.settings["L"], case.settings["num_mem_tokens"]
    config = CONFIGS["llama"]()
    weight = case.tensors["embed_tokens.weight"]
    config.vocab_size, config.hidden_size = weight.shape
    base = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(weight)
    results: dict[str, Tensor] = {}
    for kind, segment_size in (("train", length), ("generate", length + 1)):
        # A segment that fills runs with its write memory, one that stays open without.
        settings = {"segment_size": segment_size, "num_memory_tokens": m, "count_padding": True}
        model = memwrap.wrap(base, memwrap.RMTConfig(**settings))
        state = model.new_state(ids.shape[0])
        state.memories["rmt"] = {"tokens": case.tensors["memory_state"]}
        seen: dict[str, Any] = {}
        handle = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(ids, attention_mask=mask, cache=state)
        handle.remove()
        # What stands at padding is not defined here: nobody sees it (asserted below).
        want = case.tensors[f"out.inputs_embeds_{kind}"]
        keys = case.tensors[f"out.attention_mask_{kind}"].bool()
        embeds = torch.where(keys[..., None], seen["inputs_embeds"], want)
        results[f"out.inputs_embeds_{kind}"] = embeds
        total = embeds.shape[1]
        assert (seen["position_ids"] == torch.arange(total)).all()
        # Row i of the 4-D mask: which keys query i sees. Causal, and padding hidden.
        visible = seen["attention_mask"][:, 0]
        causal = torch.ones(total, total, dtype=torch.bool).tril() & keys[:, None, :]
        own = torch.eye(total, dtype=torch.bool) & ~keys[:, None, :]  # padding sees itself
        assert torch.equal(visible, causal | own)
        # So a key counts as visible if anyone but itself sees it (the last one: if it does).
        others = (visible & ~torch.eye(total, dtype=torch.bool)).any(1)
        others[:, -1] = visible[:, -1, -1] & keys[:, -1]
        results[f"out.attention_mask_{kind}"] = others.long()
        memwrap.unwrap(model)
    return results


def run_model(case: Case) -> dict[str, Tensor]:
    case.known(
        "B", "T", "segment_size", "num_mem_tokens", "segment_alignment", "k2", "max_n_segments",
        "n_segments",
    )  # fmt: skip
    model = model_of(case)
    results = {"out.logits": logits_of(model, case)}
    states = states_by_segment(model, case)
    assert len(states) == case.settings["n_segments"]
    for index, state in enumerate(states):
        results[f"out.memory_state_{index}"] = state.memories["rmt"]["tokens"]
    loss = model.train()(
        case.tensors["input_ids"],
        attention_mask=case.tensors.get("attention_mask"),
        shift_labels=shift_labels_of(case),
    ).loss
    results["out.loss"] = loss
    loss.backward()
    results["grad.memory"] = model.memories["rmt"].tokens.grad
    prefix = "grad.base."
    parameters = dict(model.backbone.named_parameters())
    for name in case.expected:
        if name.startswith(prefix):
            results[name] = parameters[name[len(prefix) :]].grad
    return results


def run_generation(case: Case) -> dict[str, Tensor]:
    case.known("B", "T", "segment_size", "num_mem_tokens", "max_new_tokens", "nu")
    assert "no write memory" in case.about["semantics"], "another way to generate"
    return {"gen.ids": generated_by(model_of(case), case)}


def run(case: Case) -> dict[str, Tensor]:
    """Choose by what the case holds; what is not understood fails."""
    if case.about["level"] == "op" and any("segment_lengths" in n for n in case.expected):
        return run_split(case)
    if case.about["level"] == "op" and any("inputs_embeds" in n for n in case.expected):
        return run_layout(case)
    if case.about["level"] == "model" and "gen.ids" in case.expected:
        return run_generation(case)
    if case.about["level"] == "model" and "out.logits" in case.expected:
        return run_model(case)
    pytest.fail(f"{case.name}: not understood; it expects {sorted(case.expected)}")


@pytest.mark.parametrize("name", names_of("rmt"))
def test_rmt(name: str) -> None:
    case = read_case("rmt", name)
    compare(case, run(case), TOLERANCES)


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("rmt", "strange", about, {"out.x": torch.ones(1)}))
