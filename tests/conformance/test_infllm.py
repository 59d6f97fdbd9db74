"""Conformance of InfLLM: every case, with the original's mask and its choice a whole block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, names_of, read_case
from one_layer import OneLayer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap

FIELDS = {
    "n_init": "num_sinks", "n_local": "window_size", "block_size": "block_size", "topk": "top_k",
    "repr_topk": "num_representatives", "exc_block_size": "segment_size",
    "max_cached_block": "cache_size",
}  # fmt: skip
# What says how the case was made, not what is computed.
ABOUT = ("seed", "min_gap_repr_score", "min_gap_topk_score", "units_created", "exc_blocks")
OFFLOAD = pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])


def config_of(case: Case, offload: bool) -> memwrap.InfLLMConfig:
    settings = case.settings
    assert settings["distance_scale"] == 1.0 and settings.get("cache_strategy", "lru") == "lru"
    fields = {ours: settings[theirs] for theirs, ours in FIELDS.items()}
    return memwrap.InfLLMConfig(
        **fields, selection="block", window_mask="published", offload=offload
    )


class Layer:
    """The case's attention layer, and what it records."""

    def __init__(self, case: Case, offload: bool) -> None:
        s = case.settings
        self.tensors, self.config = case.tensors, config_of(case, offload)
        self.layer = OneLayer(self.config, s["Hq"], s["Hkv"], s["d"], s["B"], s["base"])
        self.scores: dict[int, Tensor] = {}
        self.got: dict[str, Tensor] = {}

    def read(self, first: int, count: int, index: int) -> Tensor:
        out = self.layer.attend(*(self.tensors[n][:, :, first : first + count] for n in "qkv"))
        chosen = [row[row >= 0] for row in self.layer.state["chosen"]]
        if chosen[0].numel():
            self.got[f"block_topk.{index}"] = torch.stack(chosen)
        self.note(first, count, self.layer.state)
        self.layer.close()
        return out

    def note(self, first: int, count: int, state: Any) -> None:
        """The scores of all tokens that are in no unit yet, by their number in the text."""
        kept = state["score"].shape[2]
        for column in range(max(0, kept - first), kept):
            self.scores[first - kept + column] = state["score"][..., column]
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
        return sum(page["rep"].shape[1] for page in self.layer.state["index"]["store"].values())

    def finish(self) -> None:
        pages = sorted(self.layer.state["index"]["store"].items(), key=lambda page: int(page[0]))
        reps = torch.cat([page["rep"] for _, page in pages], 1)
        self.got |= {f"rep.{unit}": reps[:, unit] for unit in range(reps.shape[1])}
        made = {f"score.{unit}" for unit in range(reps.shape[1])}
        self.got = {n: t for n, t in self.got.items() if not n.startswith("score.") or n in made}


def run_op(case: Case, offload: bool) -> None:
    case.known("B", "Hq", "Hkv", "d", "base", "distance_scale", "cache_strategy", "call_lengths",
               *FIELDS, *ABOUT)  # fmt: skip
    layer, first, index = Layer(case, offload), 0, 0
    outputs = []
    calls = case.tensors["call_lengths"].tolist()
    assert calls == case.settings["call_lengths"]
    for length in calls:
        end = first + length
        while first < end:
            count = min(layer.config.segment_size, end - first)
            outputs.append(layer.read(first, count, index))
            first, index = first + count, index + 1
    layer.finish()
    assert layer.units() == case.settings["units_created"] and index == case.settings["exc_blocks"]
    layer.got["out"] = torch.cat(outputs, 2)
    expected = case.tensors.keys() - {"q", "k", "v", "call_lengths"}
    assert layer.got.keys() == expected, sorted(layer.got.keys() ^ expected)
    for name in sorted(expected):
        want, got = case.tensors[name], layer.got[name]
        if name.startswith("block_topk."):
            assert got.tolist() == want.tolist(), name  # selections are exact
        else:
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * max(1, want.abs().max()))


def run_model(case: Case, offload: bool) -> None:
    base = ("vocab", "hidden", "layers", "heads", "kv_heads", "intermediate", "rope_theta",
            "base", "rms_eps")  # fmt: skip
    case.known(*base, "distance_scale", "chunk_size", "prompt_tokens", "decode_steps", *FIELDS,
               *ABOUT)  # fmt: skip
    case.given("input_ids", "call_lengths", "logits")
    s = case.settings
    assert s["base"] == s["rope_theta"]
    config = LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["hidden"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"],
        intermediate_size=s["intermediate"], rms_norm_eps=s["rms_eps"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(s["rope_theta"])},
    )  # fmt: skip
    backbone = LlamaForCausalLM._from_config(config)
    weights = {n[len("base.") :]: t for n, t in case.tensors.items() if n.startswith("base.")}
    backbone.load_state_dict(weights, strict=True)
    model = memwrap.wrap(backbone.eval(), config_of(case, offload))
    calls = case.tensors["call_lengths"].tolist()
    prompt, size = s["prompt_tokens"] - 1, s["chunk_size"]
    wanted = [size] * (prompt // size) + [prompt % size] + [1] * (s["decode_steps"] + 1)
    assert calls == [c for c in wanted if c]
    state, logits = model.new_state(1), []
    with torch.no_grad():
        for piece in case.tensors["input_ids"].split(calls, 1):
            out = model(piece, cache=state)
            state = model.close_segment(out.cache)  # no call shares a block
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), case.tensors["logits"], rtol=0, atol=5e-5)
    units = [
        sum(page["rep"].shape[1] for page in tree["index"]["store"].values())
        for tree in state.memories["infllm"]["layers"].values()
    ]
    assert units == s["units_created"]


@OFFLOAD
@pytest.mark.parametrize("name", names_of("infllm"))
def test_case(name: str, offload: bool) -> None:
    case = read_case("infllm", name)
    {"op": run_op, "model": run_model}[case.about["level"]](case, offload)
