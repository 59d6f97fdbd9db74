"""Conformance of RMT: every reference case in the folder, through the public classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone_of, base_gradients, llama, sizes_in_words
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from models import alignment_of, generated, greedy, logits_of, shift_labels_of, states_by_segment
from torch import Tensor

import memwrap
from memwrap.engine.plan import segment_lengths

# Memory tokens are read and written anew in every segment, and so is their rounding. Met: 2e-5 and
# 3e-5 in the references' own float32, 3e-5 and 6e-5 in ours with another order of sums.
TOLERANCES = Tolerances(
    reference={"": 1e-4, "grad.": 1.5e-4, "out.loss": 1e-6},
    float32={"": 1.5e-4, "grad.": 2.5e-4, "out.loss": 1e-6},
)


class PublishedTruncation(memwrap.RMTConfig):
    """The published rule: the edge after segment s is cut iff `s >= 1` and
    `s + bptt_segments <= max_n_segments`. memwrap cuts every `bptt_segments` segments."""

    def __init__(self, most: int, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self.most = most

    def detach_before(self, segment: int) -> bool:
        done = segment - 1
        return done >= 1 and done + self.bptt_segments <= self.most


def model_of(case: Case, mask: Tensor | None) -> Any:
    settings = {
        "segment_size": case.settings["segment_size"],
        "num_memory_tokens": case.settings["num_mem_tokens"],
        "alignment": alignment_of(case),
        "count_padding": mask is not None and not bool(mask.all()),
    }
    window = case.settings.get("k2")
    truncated = {} if window in (-1, None) else {"bptt_segments": window}
    config = memwrap.RMTConfig(**settings, **truncated)
    model = memwrap.wrap(backbone_of(case, sizes_in_words(case)), config)
    if truncated:
        most = case.settings["max_n_segments"]
        model.memory_configs = [PublishedTruncation(most, settings | truncated)]
    with torch.no_grad():
        model.memories["rmt"].tokens.copy_(case.tensors["memory"])
    return model.eval()


def run_split(case: Case) -> Got:
    total, size = case.tensors["input_ids"].shape[1], case.settings["segment_size"]
    case.holds(T=total)
    prefix = "out.segment_lengths_"
    return {
        name: torch.tensor(segment_lengths(total, size, name.removeprefix(prefix)))
        for name in case.tensors
        if name.startswith(prefix)
    }


def run_layout(case: Case) -> Got:
    """What the backbone's decoder is given: embeddings, and who is visible as a key."""
    ids, mask = case.tensors["input_ids"], case.tensors["attention_mask"]
    weight, given = case.tensors["embed_tokens.weight"], case.tensors["memory_state"]
    length, m = ids.shape[1], given.shape[1]
    case.holds(B=len(ids), L=length, num_mem_tokens=m)
    sizes = {
        "vocab_size": weight.shape[0], "hidden_size": weight.shape[1], "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    base = llama(sizes).to(case.dtype).eval()
    base.set_attn_implementation("sdpa")
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(weight)
    results: dict[str, Tensor] = {}
    for kind, segment_size in (("train", length), ("generate", length + 1)):
        # A segment that fills runs with its write memory, one that stays open without.
        settings = {"segment_size": segment_size, "num_memory_tokens": m, "count_padding": True}
        model = memwrap.wrap(base, memwrap.RMTConfig(**settings))
        state = model.new_state(len(ids))
        state.memories["rmt"] = {"tokens": given}
        seen: dict[str, Any] = {}
        handle = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            model(ids, attention_mask=mask, cache=state)
        handle.remove()
        # What stands at padding is not defined here: nobody sees it (asserted below).
        keys = case.want(f"out.attention_mask_{kind}").bool()
        want = case.want(f"out.inputs_embeds_{kind}")
        results[f"out.inputs_embeds_{kind}"] = torch.where(
            keys[..., None], seen["inputs_embeds"], want
        )
        assert (seen["position_ids"] == torch.arange(keys.shape[1])).all()
        results[f"out.attention_mask_{kind}"] = visible_keys(seen["attention_mask"], keys)
        memwrap.unwrap(model)
    return results


def visible_keys(mask: Tensor | None, keys: Tensor) -> Tensor:
    """Which keys the decoder's mask shows, `(B, T)`; checks that it is causal besides.

    Args:
        mask: `(B, 1, T, T)` bool, or None where all is plainly causal.
        keys: those that should be.
    """
    total = keys.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    if mask is None:
        return torch.ones_like(keys).long()
    itself = torch.eye(total, dtype=torch.bool)
    visible = mask[:, 0]
    # Padding sees itself.
    assert torch.equal(visible, (causal & keys[:, None, :]) | (itself & ~keys[:, None, :]))
    # So a key counts as visible if anyone but itself sees it (the last one: if it does).
    others = (visible & ~itself).any(1)
    others[:, -1] = visible[:, -1, -1] & keys[:, -1]
    return others.long()


def run_model(case: Case) -> Got:
    ids, mask = case.tensors["input_ids"], case.given("attention_mask")
    model = model_of(case, mask)
    lengths = segment_lengths(ids.shape[1], case.settings["segment_size"], alignment_of(case))
    case.holds(B=len(ids), T=ids.shape[1], n_segments=len(lengths))
    case.aside("max_n_segments")  # where nothing is truncated
    results = {"out.logits": logits_of(model, ids, mask, case.want("out.logits"))}
    for index, state in enumerate(states_by_segment(model, ids, mask, lengths)):
        results[f"out.memory_state_{index}"] = state.memories["rmt"]["tokens"]
    loss = model.train()(ids, attention_mask=mask, shift_labels=shift_labels_of(case)).loss
    loss.backward()
    results |= {"out.loss": loss, "grad.memory": model.memories["rmt"].tokens.grad}
    return results | base_gradients(model, case)


def run_generation(case: Case) -> Got:
    """Greedy tokens: the last segment left open, or, as the main branch has it, behind the last
    segment's write memory, which memwrap's own `generate` never continues: there the state is
    memwrap's, and the bare backbone goes on from it."""
    ids, count = case.tensors["input_ids"], case.settings["max_new_tokens"]
    case.holds(B=len(ids), T=ids.shape[1])
    case.aside("nu")  # of the harness, for ARMT
    model = model_of(case, None)
    if "no write memory" in case.says:
        return {"gen.ids": generated(model, ids, count)}
    assert "write memory INCLUDED" in case.says, f"{case.name}: another way to generate"
    assert alignment_of(case) == "left"
    last = (ids.shape[1] - 1) // case.settings["segment_size"] * case.settings["segment_size"]
    state = model.read(ids[:, :last]) if last else model.new_state(len(ids))
    memory = state.memories["rmt"]["tokens"]
    backbone = memwrap.unwrap(model)
    tokens = backbone.get_input_embeddings()(ids[:, last:])
    return {"gen.ids": greedy(backbone, torch.cat([memory, tokens, memory], 1), count)}


def run(case: Case) -> Got:
    """Choose by what the case holds; what is not understood fails."""
    holds = " ".join(case.tensors)
    if case.level == "op" and "out.segment_lengths" in holds:
        return run_split(case)
    if case.level == "op" and "out.inputs_embeds" in holds:
        return run_layout(case)
    if case.level == "model" and "gen.ids" in holds:
        return run_generation(case)
    if case.level == "model" and "out.logits" in holds:
        return run_model(case)
    return case.not_understood()


def check(case: Case) -> None:
    compare(case, run(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", names_of("rmt"))
def test_rmt(name: str, dtype: torch.dtype) -> None:
    check(read_case("rmt", name, dtype))
