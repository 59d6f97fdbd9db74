"""Conformance of HMT: every reference case in the folder, through the public classes and ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones import backbone_of, base_gradients, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from models import cuts_of
from torch import Tensor

import memwrap
from memwrap.engine.plan import segment_lengths
from memwrap.engine.step import SegmentReader
from memwrap.memories.protocol import SegmentTokens
from memwrap.ops.cache_search import search_cache
from memwrap.state.trees import Tree

# The loss of a case is a sum that nearly cancels.
OP = Tolerances(reference={"": 1e-5, "loss": 1e-3}, float32={"": 1e-5, "loss": 1e-3})
# A chain of four to six segments, each through two passes and a softmax over what they left: 1e-4
# was met in the cache, 2e-5 in logits, 4e-4 in gradients.
MODEL = Tolerances(
    reference={"": 4e-4, "logits": 1e-4, "loss": 1e-5, "grad.": 2e-3},
    float32={"": 4e-4, "logits": 1e-4, "loss": 1e-5, "grad.": 2e-3},
)


def run_recall(case: Case) -> Got:
    """The op over a buffer of the cache's whole capacity."""
    leaves = case.leaves("query_summary", "memory_cache", "W_q", "W_k")
    size, (batch, rows, width) = case.settings["cache_capacity_N"], leaves["memory_cache"].shape
    case.holds(batch=batch, d=width, cache_rows_m=rows, d_h=len(leaves["W_q"]))
    # What stands at empty places must not matter.
    empty = torch.full((batch, size - rows, width), 7.0, dtype=case.dtype)
    cache = torch.cat([leaves["memory_cache"], empty], 1)
    found, weights = search_cache(
        leaves["query_summary"][:, 0], cache, torch.full((batch,), rows), leaves["W_q"],
        leaves["W_k"],
    )  # fmt: skip
    loss = (found[:, None] * case.tensors["loss_weight"]).sum()
    loss.backward()
    back = min(case.settings["segment_index"], size) - weights.argmax(-1)
    results = {"recalled": found, "loss": loss, "context_distance": back}
    return results | gradients_of(leaves)


def model_of(case: Case) -> Any:
    config = memwrap.HMTConfig(
        segment_size=case.settings["segment_length"],
        num_sensory=case.settings["num_sensory"],
        summary_fraction=case.settings["sum_fraction"],
        cache_size=case.settings["cache_capacity_N"],
        d_mem=case.settings["recall_dim_d_h"],
        recall=case.settings["use_recall"],
        count_padding=not bool(case.tensors["attention_mask"].all()),
    )
    model = memwrap.wrap(backbone_of(case, sizes_of(case.settings["base"])), config)
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


class PublishedReader:
    """Reads as the published code does: the topic that opens a segment is that of its own
    beginning, which its first tokens then depend on. memwrap's takes the end of the segment
    before, so the state is changed by hand as each segment opens."""

    def __init__(self, model: Any, case: Case) -> None:
        self.model, self.memory = model, model.memories["hmt"]
        self.ids, self.mask = case.tensors["input_ids"], case.tensors["attention_mask"]
        self.size = round(case.settings["segment_length"] * case.settings["sum_fraction"])

    def topic(self, columns: slice) -> Tensor:
        """The topic `(B, D)` of a segment's beginning."""
        part = slice(columns.start, min(columns.start + self.size, columns.stop))
        embeds = self.model.get_input_embeddings()(self.ids[:, part])
        visible = self.mask[:, part].bool()
        counted = torch.ones_like(visible)
        alone = SegmentReader(self.model.parts, self.model.memories).alone
        tokens = SegmentTokens(embeds, None, visible, counted, alone)
        return self.memory.topic(embeds, visible, counted, tokens)

    def opened(self, state: memwrap.MemoryState, columns: slice) -> memwrap.MemoryState:
        """The state with what the segment at `columns` recalls."""
        tree = state.memories["hmt"]
        if not self.memory.config.recall or not bool(tree["count"].any()):
            return state
        state = state.clone()
        state.memories["hmt"] = self.memory._searched(tree, self.topic(columns))
        return state

    def __call__(self, cuts: list[slice], **keywords: Any) -> Iterator[tuple[Tree, Any]]:
        """For each segment the memory's tree as it opened, and what the model gave."""
        state = self.model.new_state(len(self.ids))
        targets = keywords.pop("shift_labels", None)
        for columns in cuts:
            state = self.opened(state, columns)
            tree = state.memories["hmt"]
            own = {} if targets is None else {"shift_labels": targets[:, columns]}
            mask = self.mask[:, columns]
            out = self.model(
                self.ids[:, columns], attention_mask=mask, cache=state, **own, **keywords
            )
            state = out.cache
            yield tree, out


@torch.no_grad()
def read_by_segment(
    model: Any, case: Case, cuts: list[slice]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What each segment recalls and leaves, read one segment at a time, and its logits."""
    reader, searching = PublishedReader(model, case), model.memories["hmt"].config.recall
    recalled, written, back, logits = [], [], [], []
    capacity = case.settings["cache_capacity_N"]
    for index, (opened, out) in enumerate(reader(cuts)):
        recalled.append(opened["prompt"])
        logits.append(out.logits)
        tree = model.close_segment(out.cache).memories["hmt"]
        assert tree["count"].tolist() == [min(index + 1, capacity)] * len(reader.ids)
        written.append(tree["cache"][:, int(tree["count"][0]) - 1, None])
        if index:
            back.append(min(index, capacity) - opened["weights"].argmax(-1))
    results = {"recalled": torch.cat(recalled, 1), "memory_embeddings": torch.cat(written, 1)}
    results["cache_final"] = tree["cache"][:, : int(tree["count"][0])]
    if searching:
        results["context_distance"] = torch.stack(back)
        results["topic_summaries"] = torch.stack([reader.topic(c) for c in cuts], 1)
    return results, logits


def run_model(case: Case) -> Got:
    model, ids, mask = model_of(case), case.tensors["input_ids"], case.tensors["attention_mask"]
    lengths = segment_lengths(ids.shape[1], case.settings["segment_length"])
    case.holds(segments=len(lengths))
    cuts = cuts_of(lengths, ids.shape[1])
    results, pieces = read_by_segment(model, case, cuts)
    first = cuts[-min(case.settings["n_cell_out"], len(cuts))].start
    # The original also computes logits at padding; ours are zeros, and nobody reads either.
    shown, logits = mask[:, first:, None].bool(), torch.cat(pieces, 1)[:, first:]
    results["logits"] = torch.where(shown, logits, case.want("logits"))
    targets = targets_of(case)
    count = (targets.masked_fill(mask == 0, -100) != -100).sum()
    reader = PublishedReader(model.train(), case)
    parts = reader(cuts, shift_labels=targets, num_items_in_batch=count)
    loss = torch.stack([out.loss for _, out in parts]).sum()
    loss.backward()
    results["loss"] = loss
    results |= {f"grad.{n}": p.grad for n, p in parameters_of(model).items()}  # type: ignore[misc]
    return results | base_gradients(model, case)


def run(case: Case) -> Got:
    """Choose by what the case holds; what is not understood fails."""
    if case.level == "op" and "memory_cache" in case.tensors:
        return run_recall(case)
    if case.level == "model" and "memory_embeddings" in case.tensors:
        return run_model(case)
    return case.not_understood()


def check(case: Case) -> None:
    compare(case, run(case), OP if case.level == "op" else MODEL)


@both_precisions
@pytest.mark.parametrize("name", names_of("hmt"))
def test_hmt(name: str, dtype: torch.dtype) -> None:
    check(read_case("hmt", name, dtype))
