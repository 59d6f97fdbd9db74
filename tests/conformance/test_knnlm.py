"""Conformance of kNN-LM: every reference case in the folder, through the public classes and ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone_of, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from models import next_tokens
from torch import Tensor

import memwrap
from memwrap.ops.interpolation import interpolate, naive, neighbour_probabilities
from memwrap.retrieval.datastore import add_document
from memwrap.stores import FaissStore, TorchStore
from memwrap.testing.margins import record

NOTHING = -10000.0  # the reference's log of zero
OP = Tolerances(reference={"": 1e-6}, float32={"": 1e-6})
# Keys are float16, whose last bit is 2^-11 to 2^-10 of a number.
MODEL = Tolerances(
    reference={"": 1e-5, "datastore_keys": 1e-3},
    float32={"": 1e-5, "datastore_keys": 1e-3},
)


def run_op(case: Case, kind: type) -> Got:
    settings, t = case.settings, case.tensors
    keys, values, logits = t["datastore_keys"], t["datastore_values"][:, 0], t["lm_logits"]
    case.holds(
        distance="squared L2", vocab=logits.shape[1], datastore_size=len(keys), dim=keys.shape[1]
    )
    store = kind(keys.shape[1])
    store.add(keys.float(), values=values)
    found = store.search(t["queries"].float(), settings["k"])
    tokens = torch.from_numpy(store.entries(found.ids).values.astype("int64"))
    share, heat = settings["lmbda"], settings["knn_temp"]
    mixed = interpolate(logits, found.scores, tokens, share, heat)
    near(mixed.logsumexp(-1), logits.logsumexp(-1), "log-sum-exp")
    plain = naive(logits.double(), found.scores.double(), tokens, share, heat)
    near(mixed.log_softmax(-1).double(), plain, "naive")
    p = neighbour_probabilities(found.scores, tokens, logits.shape[1], heat)
    # Where there is nothing, and the logarithms of the rest, whose scale is not -10000.
    want = case.want("knn_log_probs")
    there = want > NOTHING
    assert torch.equal(p > 0, there)
    case.tensors["knn_log_probs"] = want.where(there, 0.0)
    return {
        "knn_distances": found.scores, "knn_ids": found.ids,
        "knn_log_probs": p.log().where(there, 0.0), "interpolated_log_probs": mixed.log_softmax(-1),
    }  # fmt: skip


def near(got: Tensor, want: Tensor, what: str, most: float = 1e-5) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    record(error, most, what)
    assert error <= most, f"{what}: {error:.1e}"


def entries_of(case: Case, model: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of the case's texts. Their padding is read as any text, as published, but
    gives no entry."""
    ids, labels = case.tensors["store_input_ids"], case.tensors["store_labels"]
    store = FaissStore(case.want("datastore_keys").shape[1])
    for row in ids:
        add_document(model, store, row)
    kept = (labels[:, 1:] != -100).flatten().nonzero().squeeze(1)
    values = torch.from_numpy(store.entries(kept).values)
    return store.vectors(kept.tolist()), values


@torch.no_grad()
def run_model(case: Case, kind: type) -> Got:
    """The reference mixes where there is a label (or only at the end); memwrap everywhere. What it
    left alone is compared with memwrap's logits without the memory. It searches the reference's
    own keys: whose last bit of float16 falls where is chance."""
    settings, t = case.settings, case.tensors
    ids, labels = t["input_ids"], t["labels"]
    assert settings["key"].startswith("input of") and ".mlp" in settings["key"]
    config = memwrap.KnnLMConfig(
        segment_size=max(ids.shape[1], t["store_input_ids"].shape[1]), top_k=settings["k"],
        interpolation=settings["lmbda"], temperature=settings["knn_temp"],
    )  # fmt: skip
    model: Any = memwrap.wrap(backbone_of(case, sizes_of(settings["base"])), config)
    keys, values = entries_of(case, model)
    store = kind(keys.shape[1])
    store.add(case.want("datastore_keys").float(), values=values)
    plain = model(ids)
    model.memories["knnlm"].attach(store)
    mixed = model(ids).logits
    last = torch.arange(ids.shape[1]) == ids.shape[1] - 1

    def where(chosen: Tensor) -> Tensor:
        return torch.where(chosen[..., None], mixed.log_softmax(-1), plain.logits)

    return {
        "datastore_keys": keys,
        "datastore_values": values[:, None],
        "lm_logits": plain.logits,
        "lm_loss": model(ids, labels=labels, memory_control="off").loss,
        "knn_output": where(next_tokens(labels) != -100),
        "knn_loss": model(ids, labels=labels).loss,
        "knn_output_without_labels": where(last.expand_as(ids)),
    }


def check(case: Case, kind: type = FaissStore) -> None:
    run, tolerances = {"op": (run_op, OP), "model": (run_model, MODEL)}[case.level]
    compare(case, run(case, kind), tolerances)


@both_precisions
@pytest.mark.parametrize("kind", [TorchStore, FaissStore])
@pytest.mark.parametrize("name", names_of("knnlm"))
def test_reference_case(name: str, kind: type, dtype: torch.dtype) -> None:
    check(read_case("knnlm", name, dtype), kind)
