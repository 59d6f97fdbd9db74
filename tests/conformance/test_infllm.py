"""Conformance of InfLLM: every case, with the original's mask and its choice a whole block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone_of, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from one_layer import OneLayer, scaled_rope
from torch import Tensor

import memwrap

# Scores are sums over a window's queries: 9e-7 was met.
OP = Tolerances(reference={"": 2e-6}, float32={"": 4e-6})
MODEL = Tolerances(reference={"": 1e-5}, float32={"": 2e-5})
FIELDS = {
    "n_init": "num_sinks", "n_local": "window_size", "block_size": "block_size", "topk": "top_k",
    "repr_topk": "num_representatives", "exc_block_size": "segment_size",
    "max_cached_block": "cache_size",
}  # fmt: skip
OFFLOAD = pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])


def config_of(case: Case, offload: bool) -> memwrap.InfLLMConfig:
    settings = case.settings
    case.aside("seed", "min_gap_repr_score", "min_gap_topk_score")
    # Which units stay on the device changes no result, there as here.
    assert settings.get("cache_strategy", "lru") in ("lru", "lru-s", "fifo")
    fields = {ours: settings[theirs] for theirs, ours in FIELDS.items()}
    return memwrap.InfLLMConfig(
        **fields, selection="block", window_mask="published", offload=offload
    )


def units_of(tree: Any) -> int:
    return sum(page["rep"].shape[1] for page in tree["index"]["store"].values())


class Layer:
    """The case's attention layer, and what it records."""

    def __init__(self, case: Case, offload: bool) -> None:
        s, self.config = case.settings, config_of(case, offload)
        self.inputs = [case.tensors[n] for n in "qkv"]
        self.layer = OneLayer(
            self.config, s["Hq"], s["Hkv"], s["d"], s["B"], s["base"], case.dtype,
            s["distance_scale"],
        )  # fmt: skip
        self.scores: dict[int, Tensor] = {}
        self.got: dict[str, Tensor] = {}

    def read(self, first: int, count: int, index: int) -> Tensor:
        out = self.layer.attend(*(x[:, :, first : first + count] for x in self.inputs))
        chosen = [row[0][row[0] > 0] - 1 for row in self.layer.state["chosen"]]
        if chosen[0].numel():
            self.got[f"block_topk.{index}"] = torch.stack(chosen)
        self.note(first, count, self.layer.state)
        self.layer.close()
        return out

    def note(self, first: int, count: int, state: Any) -> None:
        """The scores of all tokens that are in no unit yet, by their number in the text."""
        kept = state["recent"]["score"].shape[2]
        for column in range(max(0, kept - first), kept):
            self.scores[first - kept + column] = state["recent"]["score"][..., column]
        for place in range(count):
            self.scores[first + place] = state["open_score"][..., place]
        created = self.units()
        block, sinks = self.config.block_size, self.config.num_sinks
        for unit in range(created, (first + count) // block):
            tokens = range(sinks + unit * block, sinks + (unit + 1) * block)
            if tokens[-1] in self.scores:
                score = torch.stack([self.scores[t] for t in tokens], -1)
                self.got[f"score.{unit}"] = score

    def units(self) -> int:
        return units_of(self.layer.state)

    def finish(self) -> None:
        pages = sorted(self.layer.state["index"]["store"].items(), key=lambda page: int(page[0]))
        reps = torch.cat([page["rep"] for _, page in pages], 1)
        self.got |= {f"rep.{unit}": reps[:, unit] for unit in range(reps.shape[1])}
        made = {f"score.{unit}" for unit in range(reps.shape[1])}
        self.got = {n: t for n, t in self.got.items() if not n.startswith("score.") or n in made}


def run_op(case: Case, offload: bool) -> Got:
    layer, first, index = Layer(case, offload), 0, 0
    outputs = []
    calls = case.tensors["call_lengths"].tolist()
    for length in calls:
        end = first + length
        while first < end:
            count = min(layer.config.segment_size, end - first)
            outputs.append(layer.read(first, count, index))
            first, index = first + count, index + 1
    layer.finish()
    case.holds(call_lengths=calls, units_created=layer.units(), exc_blocks=index)
    return {**layer.got, "out": torch.cat(outputs, 2)}


def run_model(case: Case, offload: bool) -> Got:
    s, calls = case.settings, case.tensors["call_lengths"].tolist()
    sizes = sizes_of(s)
    case.holds(base=s["rope_theta"])
    rope = {"rope_parameters": scaled_rope(sizes.pop("rope_theta"), s["distance_scale"])}
    model = memwrap.wrap(backbone_of(case, sizes | rope), config_of(case, offload))
    prompt, size = s["prompt_tokens"] - 1, s["chunk_size"]
    wanted = [size] * (prompt // size) + [prompt % size] + [1] * (s["decode_steps"] + 1)
    assert calls == [c for c in wanted if c]
    state, logits = model.new_state(1), []
    with torch.no_grad():
        for piece in case.tensors["input_ids"].split(calls, 1):
            out = model(piece, cache=state)
            state = model.close_segment(out.cache)  # no call shares a block
            logits.append(out.logits)
    layers = state.memories["infllm"]["layers"].values()
    case.holds(units_created=[units_of(tree) for tree in layers])
    return {"logits": torch.cat(logits, 1)}


def check(case: Case, offload: bool = False) -> None:
    run, tolerances = {"op": (run_op, OP), "model": (run_model, MODEL)}[case.level]
    compare(case, run(case, offload), tolerances)


@OFFLOAD
@both_precisions
@pytest.mark.parametrize("name", names_of("infllm"))
def test_case(name: str, offload: bool, dtype: torch.dtype) -> None:
    check(read_case("infllm", name, dtype), offload)
