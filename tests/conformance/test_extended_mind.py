"""Conformance of Extended Mind: every case in the folder, through the ops and the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, compare, described_backbone, names_of, read_case
from torch import Tensor

import memwrap
from memwrap.memories.extended_mind import retrieved
from memwrap.ops import backend, retrieve

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# float32 against float32; indices exactly.
TOLERANCES = {"": 1e-5, "grad.": 2e-5}
MODEL_TOLERANCES = {"": 2e-5}


def rotated(x: Tensor, start: int, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    frequency = theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angle = torch.outer(torch.arange(start, start + x.shape[-2], dtype=torch.float64), frequency)
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def run_op(case: Case) -> dict[str, Tensor]:
    """One attention: local scores by hand, retrieval by the op, one softmax over both."""
    case.known("hidden_size", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "seq_len",
               "past_len", "num_memories", "topk", "mask_by_sim", "sim_threshold",
               "loss")  # fmt: skip
    settings, t = case.settings, case.tensors
    names = [n.removeprefix("grad.") for n in t if n.startswith("grad.")]
    given = {n: t[n if n in t else f"param.{n}"] for n in names}
    leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
    x, past, width = leaves["hidden_states"], settings["past_len"], settings["head_dim"]
    q, k, v = (
        (x @ leaves[f"{n}.weight"].T).unflatten(-1, (-1, width)).transpose(1, 2)
        for n in PROJECTIONS[:3]
    )
    if past:
        k = torch.cat([leaves["past_keys_unrotated"], k], 2)
        v = torch.cat([leaves["past_values"], v], 2)
    q = rotated(q, past, settings["rope_theta"])
    k = rotated(k, 0, settings["rope_theta"])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
    scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    keys, values = leaves["memory_keys"], leaves["memory_values"]
    valid = torch.ones(1, keys.shape[2], dtype=torch.bool)
    threshold = settings["sim_threshold"] if settings["mask_by_sim"] else None
    read = retrieve.attend(
        q, keys, values, valid, settings["topk"], scale=width**-0.5, similarity="cosine",
        threshold=threshold,
    )  # fmt: skip
    total = torch.logaddexp(read.logsumexp, scores.logsumexp(-1))
    share, own = (read.logsumexp - total).exp(), (scores - total[..., None]).exp()
    out = share[..., None] * read.out + own @ v
    out = out.transpose(1, 2).flatten(2) @ leaves["o_proj.weight"].T
    loss = (out * t["loss_weight"]).sum()
    loss.backward()
    found = retrieve.search(q, keys, valid, settings["topk"], similarity="cosine")[1]
    if threshold is not None:
        assert bool((read.index == -1).any()), "the threshold leaves nothing out"
    results = {
        "attn_output": out, "loss": loss[None], "retrieved_idx": found, "attn_weights_local": own,
        "attn_weights_own_memories": read.weights * share[..., None],
    }  # fmt: skip
    return results | {f"grad.{n}": x.grad for n, x in leaves.items()}  # type: ignore[misc]


def fed(model: Any, ids: Tensor, state: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits, and what each layer retrieved."""
    with torch.no_grad(), retrieved() as notes:
        logits = model(ids, cache=state).logits
    return logits, {note.layer: note.entries for note in notes}


def run_model(case: Case) -> dict[str, Tensor]:
    """A document encoded in windows, a question, and tokens one by one."""
    case.known("base", "topk", "mask_by_sim", "sim_threshold", "use_external_mind_by_layer",
               "special_ids", "remove_special_ids", "stride", "max_len")  # fmt: skip
    settings, t = case.settings, case.tensors
    assert settings["remove_special_ids"]
    base = {**settings["base"], "tied": False}
    described = Case(case.method, case.name, {"hyperparameters": {"base": base}}, case.tensors)
    layers = [i for i, on in enumerate(settings["use_external_mind_by_layer"]) if on]
    config = memwrap.ExtendedMindConfig(
        segment_size=settings["max_len"],
        top_k=settings["topk"],
        similarity_threshold=settings["sim_threshold"] if settings["mask_by_sim"] else None,
        layers=layers,
    )
    model = memwrap.wrap(described_backbone(described), config)
    library = memwrap.Library.encode(
        model, {"document": t["memory_ids"]}, window=settings["max_len"],
        stride=settings["stride"], special_ids=settings["special_ids"],
    )  # fmt: skip
    kept = ~torch.isin(t["memory_ids"], torch.tensor(settings["special_ids"]))
    assert library.entries[:, 1].tolist() == kept.nonzero().squeeze(1).tolist()
    results = {}
    for layer in layers:
        tree = library.state.memories["extended_mind"]["layers"][str(layer)]
        results |= {f"memory.{layer}.keys": tree["key"], f"memory.{layer}.values": tree["value"]}
    ids, state = t["input_ids"], library.state.clone()
    results["logits"], found = fed(model, ids, state)
    for layer, entries in found.items():
        want = t[f"retrieved_idx.{layer}"]
        assert bool((entries >= 0).any())
        # Entries under the threshold are left out here; they have no weight there. In the first
        # layer a token that stands twice is the same key twice.
        same = entries < 0
        if layer == 0:
            tokens = t["memory_ids"][kept]
            same |= tokens[entries.clamp_min(0)] == tokens[want]
        results[f"retrieved_idx.{layer}"] = torch.where(same, want, entries)
    pieces = [fed(model, token, state)[0] for token in t["decode_ids"].split(1, 1)]
    results["decode_logits"] = torch.cat(pieces, 1)
    targets, predicted = ids[:, 1:].flatten(), results["logits"][:, :-1].flatten(0, 1)
    return results | {"loss": F.cross_entropy(predicted, targets)[None]}


INPUTS = {"hidden_states", "memory_keys", "memory_values", "loss_weight", "past_keys_unrotated",
          "past_values", "memory_ids", "input_ids", "decode_ids"}  # fmt: skip


def run(case: Case) -> dict[str, Tensor]:
    if case.about["level"] == "op" and "attn_output" in case.tensors:
        return run_op(case)
    if case.about["level"] == "model" and "decode_logits" in case.tensors:
        return run_model(case)
    pytest.fail(f"{case.name}: not understood; it holds {sorted(case.tensors)}")


def read(name: str) -> Case:
    case = read_case("extended_mind", name)
    inputs = INPUTS | {f"param.{p}.weight" for p in PROJECTIONS}
    results = {n for n in case.tensors if n not in inputs and not n.startswith("base.")}
    return Case(case.method, case.name, case.about, case.tensors, frozenset(results))


@pytest.mark.parametrize("name", names_of("extended_mind"))
def test_extended_mind(name: str) -> None:
    case = read(name)
    op = case.about["level"] == "op"
    for ops in ("torch", "naive") if op else ("torch",):
        with backend(ops):
            compare(case, run(case), TOLERANCES if op else MODEL_TOLERANCES)


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("extended_mind", "strange", about, {"out": torch.ones(1)}))
