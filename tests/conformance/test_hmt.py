"""Conformance of HMT: every reference case in the folder, through the public classes and ops."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import Case, base_gradients, compare, described_backbone, names_of, read_case
from torch import Tensor

import memwrap
from memwrap.engine.plan import segment_lengths
from memwrap.engine.step import SegmentReader
from memwrap.memories.protocol import SegmentTokens
from memwrap.ops.recall import recall

OUTPUTS = (
    "logits", "loss", "recalled", "memory_embeddings", "cache_final", "topic_summaries",
    "context_distance",
)  # fmt: skip
# Rounding alone: against the same in float64, the reference's values differ by up to 2e-5 and its
# gradients by up to 3e-4 (a chain of four to six segments, each through two passes).
MODEL_TOLERANCES = {"": 1e-4, "grad.": 1e-3}
OP_TOLERANCES = {"": 1e-12}


def run_recall(case: Case) -> dict[str, Tensor]:
    """The op over a buffer of the cache's whole capacity, in float64."""
    case.known("batch", "d", "d_h", "cache_rows_m", "cache_capacity_N", "segment_index")
    inputs = ("query_summary", "memory_cache", "W_q", "W_k")
    case.given(*inputs, "loss_weight")
    leaves = {n: case.tensors[n].clone().requires_grad_() for n in inputs}
    rows, size = case.settings["cache_rows_m"], case.settings["cache_capacity_N"]
    batch = case.settings["batch"]
    # What stands at empty places must not matter.
    empty = torch.full((batch, size - rows, case.settings["d"]), 7.0, dtype=torch.float64)
    cache = torch.cat([leaves["memory_cache"], empty], 1)
    found, weights = recall(
        leaves["query_summary"][:, 0], cache, torch.full((batch,), rows), leaves["W_q"],
        leaves["W_k"],
    )  # fmt: skip
    loss = (found[:, None] * case.tensors["loss_weight"]).sum()
    loss.backward()
    results = {f"grad.{n}": leaf.grad for n, leaf in leaves.items()}
    back = min(case.settings["segment_index"], size) - weights.argmax(-1)
    return results | {"recalled": found, "loss": loss, "context_distance": back}  # type: ignore[dict-item]


def model_of(case: Case) -> Any:
    config = memwrap.HMTConfig(
        segment_size=case.settings["segment_length"],
        num_sensory=case.settings["num_sensory"],
        summary_fraction=case.settings["sum_fraction"],
        cache_size=case.settings["cache_capacity_N"],
        d_mem=case.settings["recall_dim_d_h"],
        recall=case.settings["use_recall"],
        query="segment",
        count_padding=not bool(case.tensors["attention_mask"].all()),
    )
    model = memwrap.wrap(described_backbone(case), config)
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(case.tensors[name])
    return model.eval()


def parameters_of(model: Any) -> dict[str, Tensor]:
    memory = model.memories["hmt"]
    found = {"memory_init": memory.tokens}
    if memory.config.recall:
        found |= {"summary_prompt": memory.summary}
        found |= {"W_q": memory.query.weight, "W_k": memory.key.weight}
    return found


def targets_of(case: Case) -> Tensor:
    """The last `mask_size` labels (all but the first where there are no more), by predictor."""
    labels = case.tensors["labels"]
    total = labels.shape[1]
    count = min(case.settings["mask_size"], total - 1)
    shifted = torch.full_like(labels, -100)
    shifted[:, -(count + 1) : -1] = labels[:, -count:]
    return shifted


@torch.no_grad()
def read_by_segment(model: Any, case: Case, cuts: list[slice]) -> dict[str, Tensor]:
    """What each segment recalls and leaves, read one segment at a time."""
    ids, mask = case.tensors["input_ids"], case.tensors["attention_mask"]
    state, searching = model.new_state(ids.shape[0]), model.memories["hmt"].config.recall
    recalled, written, back = [], [], []
    capacity = case.settings["cache_capacity_N"]
    for index, columns in enumerate(cuts):
        if not searching:
            recalled.append(state.memories["hmt"]["prompt"])
        state = model.close_segment(model.read(ids[:, columns], mask[:, columns], state=state))
        tree = state.memories["hmt"]
        if searching:
            recalled.append(tree["prompt"])
        assert tree["count"].tolist() == [min(index + 1, capacity)] * ids.shape[0]
        written.append(tree["cache"][:, int(tree["count"][0]) - 1, None])
        if index:
            back.append(min(index, capacity) - tree["weights"].argmax(-1))
    tree = state.memories["hmt"]
    results = {"recalled": torch.cat(recalled, 1), "memory_embeddings": torch.cat(written, 1)}
    results["cache_final"] = tree["cache"][:, : int(tree["count"][0])]
    if searching:
        results["context_distance"] = torch.stack(back)
        results["topic_summaries"] = topics(model, case, cuts)
    return results


def topics(model: Any, case: Case, cuts: list[slice]) -> Tensor:
    memory = model.memories["hmt"]
    mask = case.tensors["attention_mask"].bool()
    embeds = model.get_input_embeddings()(case.tensors["input_ids"])
    alone = SegmentReader(model.parts, model.memories).alone
    tokens = SegmentTokens(embeds, None, mask, torch.ones_like(mask), alone)
    size = round(case.settings["segment_length"] * case.settings["sum_fraction"])
    found = []
    for columns in cuts:
        part = slice(columns.start, min(columns.start + size, columns.stop))
        seen = embeds[:, part], mask[:, part], tokens.counted[:, part]
        found.append(memory.topic(*seen, tokens)[:, None])
    return torch.cat(found, 1)


def run_model(case: Case) -> dict[str, Tensor]:
    case.known(
        "segment_length", "num_sensory", "sum_fraction", "cache_capacity_N", "recall_dim_d_h",
        "mask_size", "n_cell_out", "use_recall", "base", "segments",
    )  # fmt: skip
    model = model_of(case)
    case.given("input_ids", "attention_mask", "labels", *parameters_of(model))
    ids, mask = case.tensors["input_ids"], case.tensors["attention_mask"]
    lengths = segment_lengths(ids.shape[1], case.settings["segment_length"])
    assert len(lengths) == case.settings["segments"]
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    cuts = [slice(a, b) for a, b in pairwise(edges)]
    results = read_by_segment(model, case, cuts)
    with torch.no_grad():
        first = cuts[-min(case.settings["n_cell_out"], len(cuts))].start
        logits = model(ids, attention_mask=mask).logits[:, first:]
    # The original also computes logits at padding; ours are zeros, and nobody reads either.
    shown = mask[:, first:, None].bool()
    results["logits"] = torch.where(shown, logits, case.tensors["logits"])
    loss = model.train()(ids, attention_mask=mask, shift_labels=targets_of(case)).loss
    loss.backward()
    results["loss"] = loss
    results |= {f"grad.{n}": p.grad for n, p in parameters_of(model).items()}  # type: ignore[misc]
    return results | base_gradients(model, case)


def run(case: Case) -> dict[str, Tensor]:
    """Choose by what the case holds; what is not understood fails."""
    if case.about["level"] == "op" and "recalled" in case.expected:
        return run_recall(case)
    if case.about["level"] == "model" and "memory_embeddings" in case.expected:
        return run_model(case)
    pytest.fail(f"{case.name}: not understood; it expects {sorted(case.expected)}")


@pytest.mark.parametrize("name", names_of("hmt"))
def test_hmt(name: str) -> None:
    case = read_case("hmt", name, OUTPUTS)
    op = case.about["level"] == "op"
    compare(case, run(case), OP_TOLERANCES if op else MODEL_TOLERANCES)


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("hmt", "strange", about, {"out.x": torch.ones(1)}))
