"""Conformance of Extended Mind: every case in the folder, through the ops and the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbones import backbone_of, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from one_layer import rotated_by_hand
from torch import Tensor

import memwrap
from memwrap.memories.extended_mind import retrieved
from memwrap.ops import backend, retrieve

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TOLERANCES = Tolerances(reference={"": 1e-5}, float32={"": 2e-5})


def run_op(case: Case) -> Got:
    """One attention: local scores by hand, retrieval by the op, one softmax over both."""
    settings, t = case.settings, case.tensors
    weights = [f"{n}.weight" for n in PROJECTIONS]
    leaves = {n: t[f"param.{n}"].clone().requires_grad_() for n in weights}
    leaves |= case.leaves(
        "hidden_states", "memory_keys", "memory_values", "past_keys_unrotated", "past_values"
    )
    x, past, width = leaves["hidden_states"], settings["past_len"], settings["head_dim"]
    q, k, v = ((x @ leaves[n].T).unflatten(-1, (-1, width)).transpose(1, 2) for n in weights[:3])
    case.holds(
        hidden_size=x.shape[2], num_heads=q.shape[1], num_kv_heads=k.shape[1],
        seq_len=x.shape[1], num_memories=t["memory_keys"].shape[2],
        loss="sum(attn_output*loss_weight)",
    )  # fmt: skip
    if past:
        k = torch.cat([leaves["past_keys_unrotated"], k], 2)
        v = torch.cat([leaves["past_values"], v], 2)
    assert k.shape[2] == past + q.shape[2]
    q = rotated_by_hand(q, settings["rope_theta"], past + torch.arange(q.shape[2]))
    k = rotated_by_hand(k, settings["rope_theta"])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
    scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    keys, values = leaves["memory_keys"], leaves["memory_values"]
    valid = torch.ones(len(keys), keys.shape[2], dtype=torch.bool)
    read = retrieve.attend(
        q, keys, values, valid, settings["topk"], scale=width**-0.5, similarity="cosine",
        threshold=threshold_of(case),
    )  # fmt: skip
    total = torch.logaddexp(read.logsumexp, scores.logsumexp(-1))
    share, own = (read.logsumexp - total).exp(), (scores - total[..., None]).exp()
    out = share[..., None] * read.out + own @ v
    out = out.transpose(1, 2).flatten(2) @ leaves["o_proj.weight"].T
    loss = (out * t["loss_weight"]).sum()
    loss.backward()
    found = retrieve.search(q, keys, valid, settings["topk"], similarity="cosine")[1]
    results = {
        "attn_output": out, "loss": loss, "retrieved_idx": found, "attn_weights_local": own,
        "attn_weights_own_memories": read.weights * share[..., None],
    }  # fmt: skip
    return results | gradients_of(leaves)


def threshold_of(case: Case) -> float | None:
    threshold = case.settings["sim_threshold"]
    return threshold if case.settings["mask_by_sim"] else None


def fed(model: Any, ids: Tensor, state: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits, and what each layer retrieved."""
    with torch.no_grad(), retrieved() as notes:
        logits = model(ids, cache=state).logits
    return logits, {note.layer: note.entries for note in notes}


def model_of(case: Case, segment_size: int, layers: list[int]) -> Any:
    config = memwrap.ExtendedMindConfig(
        segment_size=segment_size, top_k=case.settings["topk"],
        similarity_threshold=threshold_of(case), layers=layers,
    )  # fmt: skip
    return memwrap.wrap(backbone_of(case, sizes_of(case.settings["base"])), config)


def run_model(case: Case) -> Got:
    """A document encoded in windows, a question, and tokens one by one."""
    settings, t = case.settings, case.tensors
    document, ids, steps = t["memory_ids"], t["input_ids"], t["decode_ids"]
    special = settings["special_ids"] if settings["remove_special_ids"] else []
    on = settings["use_external_mind_by_layer"]
    # The question is one segment, whatever the windows are.
    size = max(settings["max_len"], ids.shape[1] + steps.shape[1])
    results: dict[str, Tensor] = {}
    for layers in (list(range(len(on))), [i for i, reads in enumerate(on) if reads]):
        # The reference keeps entries of all layers, also of those that do not read them.
        model = model_of(case, size, layers)
        library = memwrap.Library.encode(
            model, {"document": document}, window=settings["max_len"],
            stride=settings["stride"], special_ids=special,
        )  # fmt: skip
        for layer, tree in library.state.memories["extended_mind"]["layers"].items():
            results[f"memory.{layer}.keys"] = tree["key"]
            results[f"memory.{layer}.values"] = tree["value"]
    kept = ~torch.isin(document, torch.tensor(special, dtype=torch.long))
    assert library.entries[:, 1].tolist() == kept.nonzero().squeeze(1).tolist()
    state = library.state.clone()
    results["logits"], found = fed(model, ids, state)
    for layer, entries in found.items():
        want = case.want(f"retrieved_idx.{layer}")
        # Entries under the threshold are left out here; they have no weight there. In the first
        # layer a token that stands twice is the same key twice.
        same = entries < 0
        if layer == 0:
            tokens = document[kept]
            same |= tokens[entries.clamp_min(0)] == tokens[want]
        results[f"retrieved_idx.{layer}"] = torch.where(same, want, entries)
    pieces = [fed(model, token, state)[0] for token in steps.split(1, 1)]
    results["decode_logits"] = torch.cat(pieces, 1)
    targets, predicted = ids[:, 1:].flatten(), results["logits"][:, :-1].flatten(0, 1)
    return results | {"loss": F.cross_entropy(predicted, targets)}


def run(case: Case) -> Got:
    if case.level == "op" and "attn_output" in case.tensors:
        return run_op(case)
    if case.level == "model" and "decode_logits" in case.tensors:
        return run_model(case)
    return case.not_understood()


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        compare(case, run(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("extended_mind"))
def test_extended_mind(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("extended_mind", name, dtype), ops)
