"""Conformance of kNN-LM: every reference case in the folder, through the public classes and ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, compare, names_of, read_case
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import memwrap
from memwrap.ops.interpolation import interpolate, naive, neighbour_probabilities
from memwrap.retrieval.datastore import add_document
from memwrap.stores import FaissStore, TorchStore

OP_OUTPUTS = ("knn_distances", "knn_ids", "knn_log_probs", "interpolated_log_probs")
MODEL_OUTPUTS = (
    "datastore_keys", "datastore_values", "lm_logits", "lm_loss", "knn_output", "knn_loss",
    "knn_output_without_labels",
)  # fmt: skip
NOTHING = -10000.0  # the reference's log of zero


def run_op(case: Case, kind: type) -> dict[str, Tensor]:
    case.known("k", "lmbda", "knn_temp", "distance", "vocab", "datastore_size", "dim")
    case.given("datastore_keys", "datastore_values", "queries", "lm_logits")
    settings, tensors = case.settings, case.tensors
    assert settings["distance"] == "squared L2"
    store = kind(settings["dim"])
    store.add(tensors["datastore_keys"].float(), values=tensors["datastore_values"][:, 0])
    found = store.search(tensors["queries"], settings["k"])
    tokens = torch.from_numpy(store.entries(found.ids).values.astype("int64"))
    logits, share, heat = tensors["lm_logits"], settings["lmbda"], settings["knn_temp"]
    mixed = interpolate(logits, found.scores, tokens, share, heat)
    assert torch.allclose(mixed.logsumexp(-1), logits.logsumexp(-1), atol=1e-5)
    plain = naive(logits.double(), found.scores.double(), tokens, share, heat)
    assert torch.allclose(mixed.log_softmax(-1).double(), plain, atol=1e-5)
    p = neighbour_probabilities(found.scores, tokens, settings["vocab"], heat)
    return {
        "knn_distances": found.scores, "knn_ids": found.ids,
        "knn_log_probs": torch.where(p > 0, p.log(), NOTHING),
        "interpolated_log_probs": mixed.log_softmax(-1),
    }  # fmt: skip


def gpt2_of(case: Case) -> GPT2LMHeadModel:
    base = dict(case.settings["base"])
    assert base.pop("arch") == "GPT2LMHeadModel" and base.pop("tied_head")
    config = GPT2Config(
        vocab_size=base.pop("vocab"), n_embd=base.pop("n_embd"), n_layer=base.pop("layers"),
        n_head=base.pop("heads"), n_positions=base.pop("n_positions"),
        activation_function=base.pop("activation"),
        layer_norm_epsilon=base.pop("layer_norm_eps"), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    assert not base, f"{sorted(base)} of the backbone is not understood"
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    weights = {n[len("base.") :]: t for n, t in case.tensors.items() if n.startswith("base.")}
    missing, foreign = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not foreign
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def run_model(case: Case) -> dict[str, Tensor]:
    """The reference mixes where there is a label (or only at the end); memwrap everywhere. What it
    left alone is compared with memwrap's logits without the memory."""
    case.known("k", "lmbda", "knn_temp", "base", "key")
    case.given("store_input_ids", "store_labels", "input_ids", "labels")
    assert case.settings["key"] == "input of transformer.h[-1].mlp (= ln_2 output)"
    tensors, settings = case.tensors, case.settings
    config = memwrap.KnnLMConfig(
        segment_size=20, top_k=settings["k"], interpolation=settings["lmbda"],
        temperature=settings["knn_temp"],
    )  # fmt: skip
    model: Any = memwrap.wrap(gpt2_of(case), config)
    store = FaissStore(48)
    assert torch.equal(tensors["store_input_ids"], tensors["store_labels"])
    for row in tensors["store_input_ids"]:
        add_document(model, store, row)
    everything = range(len(store))
    ids, labels = tensors["input_ids"], tensors["labels"]
    plain = model(ids)
    model.memories["knnlm"].attach(store)
    mixed = model(ids).logits
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    last = torch.arange(ids.shape[1]) == ids.shape[1] - 1

    def where(chosen: Tensor) -> Tensor:
        log_probs = mixed.log_softmax(-1)
        return torch.where(chosen[..., None], log_probs, plain.logits)

    return {
        "datastore_keys": store.vectors(everything).half(),
        "datastore_values": torch.from_numpy(store.entries(torch.tensor(everything)).values),
        "lm_logits": plain.logits,
        "lm_loss": model(ids, labels=labels, memory_control="off").loss[None],
        "knn_output": where(targets != -100),
        "knn_loss": model(ids, labels=labels).loss[None],
        "knn_output_without_labels": where(last.expand_as(ids)),
    }


@pytest.mark.parametrize("name", names_of("knnlm"))
def test_reference_case(name: str) -> None:
    model = name.startswith("model")
    case = read_case("knnlm", name, MODEL_OUTPUTS if model else OP_OUTPUTS)
    if model:
        got = run_model(case)
        got["datastore_values"] = got["datastore_values"][:, None]
        # Keys are rounded to float16: a last bit may fall to the other side.
        compare(case, got, {"": 2e-5, "datastore_keys": 1e-3})
        return
    assert case.about["level"] == "op"
    for kind in (TorchStore, FaissStore):
        # Log probabilities reach -10000 where nothing is: that is their scale. So the others again.
        got = run_op(case, kind)
        compare(case, got, {"": 1e-5})
        there = case.tensors["knn_log_probs"] > NOTHING
        want = case.tensors["knn_log_probs"][there]
        assert torch.allclose(got["knn_log_probs"][there], want, atol=1e-3)
