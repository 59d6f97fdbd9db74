"""Conformance of landmark attention: every case, op and model, with the choice of blocks exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, names_of, read_case
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.backbones.rotary import rotate, unrotate
from memwrap.ops import landmark as ops

MODES = {"per_token_and_head": "token", "max_over_tokens": "call"}
BASE = ("vocab", "hidden", "layers", "heads", "kv_heads", "intermediate", "rope_theta", "rms_eps")


def near(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    error = float((got.detach() - want).abs().max()) / max(float(want.abs().max()), 1e-12)
    assert got.shape == want.shape and error <= tolerance, f"{what}: {error:.1e}"


# Ops


def attend(case: Case) -> None:
    case.known(
        "B", "H", "Tq", "Tk", "d", "landmark_period", "irregular", "seed", "score_scale",
        "fused_triton_interpret_max_abs_diff",
    )  # fmt: skip
    case.given("q", "k", "v", "is_landmark", "probs", "out", "loss_weight",
               "grad_q", "grad_k", "grad_v")  # fmt: skip
    assert case.settings["score_scale"] == "1/sqrt(d)"
    exact = case.about["dtype"] == "float64"
    tolerance, rough = (1e-13, 1e-13) if exact else (2e-6, 5e-6)
    t = case.tensors
    marks = t["is_landmark"].bool()
    q, k, v = (t[n].clone().requires_grad_() for n in "qkv")
    before = k.shape[2] - q.shape[2]
    seen = torch.ones(q.shape[2], k.shape[2]).tril(before).bool().expand(len(q), -1, -1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs, _ = ops.grouped_softmax(scores, marks, seen)
    near(probs, t["probs"], tolerance, "probs")
    outs = [probs @ v]
    period = case.settings["landmark_period"]
    if period:
        assert torch.equal(
            marks, (torch.arange(k.shape[2]) % period == period - 1).expand_as(marks)
        )
        for backend in ("naive", "torch"):
            with memwrap.ops.backend(backend):
                outs.append(ops.attention(q, k, v, period - 1)[0])
    for out in outs:
        near(out, t["out"], tolerance, "out")
        found = torch.autograd.grad((out * t["loss_weight"]).sum(), (q, k, v), retain_graph=True)
        for name, gradient in zip("qkv", found, strict=True):
            near(gradient, t[f"grad_{name}"], rough, f"grad_{name}")


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`(1, H, T, D)` rotated at `(T,)`."""
    width = x.shape[-1]
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (positions[:, None].double() * rates).repeat(1, 2)[None]
    return rotate(x, (angles.cos().to(x.dtype), angles.sin().to(x.dtype)))


def retrieve(case: Case) -> None:
    """One layer that is fed call by call, with memwrap's ops."""
    case.known(
        "H", "head_dim", "mem_freq", "block", "top_k", "mode", "offload_cache_to_cpu",
        "rope_theta", "call_lengths", "landmark_rule", "seed", "topk_margin_min",
    )  # fmt: skip
    settings, t = case.settings, case.tensors
    m, top_k, theta = settings["mem_freq"], settings["top_k"], settings["rope_theta"]
    size, scaling = m + 1, settings["head_dim"] ** -0.5
    assert settings["block"] == size and settings["landmark_rule"] == "index % block == mem_freq"
    assert t["call_lengths"].tolist() == settings["call_lengths"]
    compared = {"q", "k", "v", "call_lengths", "out"}
    start, outs = 0, []
    for call, length in enumerate(settings["call_lengths"]):
        first = start // size * size  # what stands before is in complete blocks
        q, places = t["q"][:, :, start : start + length], torch.arange(start, start + length)
        k, v = (t[n][:, :, first : start + length] for n in "kv")
        local = ops.attention(
            rope(q, places - first, theta), rope(k, torch.arange(k.shape[2]), theta), v, m
        )
        count = first // size
        if not count:
            outs.append(local[0])
            start += length
            continue
        inside = torch.arange(first) % size
        blocks = rope(t["k"][:, :, :first], inside, theta).unflatten(2, (count, size))
        values = t["v"][:, :, :first].unflatten(2, (count, size))
        turns = ops.queries_for(m, top_k, places[None] - first)
        slots = q[:, :, :, None].expand(-1, -1, -1, top_k + 1, -1).flatten(2, 3)
        slots = rope(slots, turns.flatten(), theta).unflatten(2, (length, -1))
        have = torch.tensor([count])
        scores = ops.block_scores(slots, blocks[..., m, :], have, scaling)
        if MODES[settings["mode"]] == "call":
            scores = ops.shares(scores).amax(2, keepdim=True)
        ids = ops.choose(scores, top_k)
        want = t[f"selected.{call}"]
        assert torch.equal(ids.to(want.dtype), want), f"call {call}: another choice"
        compared.add(f"selected.{call}")
        back = ops.read_slots(ids, have, top_k) - 1
        own = slots.gather(3, back[..., None].expand(*slots.shape[:3], -1, slots.shape[-1]))
        valid = torch.ones(1, count, m, dtype=torch.bool)
        args = (blocks[..., :m, :], values[..., :m, :], blocks[..., m, :], valid, ids, scaling)
        outs.append(ops.merge(local, ops.retrieved(own, *args)))
        start += length
    near(torch.cat(outs, 2), t["out"], 2e-6, "out")
    assert compared == t.keys(), sorted(compared ^ t.keys())


# Models


def base_of(case: Case) -> LlamaForCausalLM:
    s = case.settings
    config = LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["hidden"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"],
        intermediate_size=s["intermediate"], rms_norm_eps=s["rms_eps"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(s["rope_theta"])},
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config)
    weights = {n[len("base.") :]: t for n, t in case.tensors.items() if n.startswith("base.")}
    model.load_state_dict(weights, strict=True)
    return model.eval()


def model_of(case: Case, segment_size: int, **settings: Any) -> Any:
    config = memwrap.LandmarkConfig(
        segment_size=segment_size, block_size=case.settings["mem_freq"],
        landmark_id=case.settings["landmark_id"], first_layer=True, **settings,
    )  # fmt: skip
    return memwrap.wrap(base_of(case), config)


def places_of(total: int, m: int) -> tuple[Tensor, Tensor]:
    """Where real tokens stand among landmarks, and where what follows each is predicted if the
    landmark predicts."""
    index = torch.arange(total)
    places = index + index // m
    return places, places + (index % m == m - 1).long()


def train(case: Case) -> None:
    case.known(*BASE, "mem_freq", "block", "landmark_id", "T", "B", "fused_kernel",
               "include_landmark_in_loss")  # fmt: skip
    settings, t = case.settings, case.tensors
    text, m, predicted = t["input_ids"], settings["mem_freq"], settings["include_landmark_in_loss"]
    compared = {"input_ids", "logits", "loss"}
    both = {
        flag: model_of(case, 64, landmark_in_loss=flag) for flag in ((False, True)[: 1 + predicted])
    }
    for flag, model in both.items():
        want = t["logits"]
        if predicted:  # the reference has the landmarks' logits too
            want = want[:, places_of(text.shape[1], m)[flag]]
        near(model(text).logits, want, 5e-5, f"logits, landmark_in_loss={flag}")
    if predicted:
        with_marks = torch.full_like(t["input_ids_with_landmarks"], settings["landmark_id"])
        with_marks[:, places_of(text.shape[1], m)[0]] = text
        assert torch.equal(with_marks, t["input_ids_with_landmarks"])
        compared.add("input_ids_with_landmarks")
    model = both[predicted].train()
    loss = model(text, labels=text).loss
    loss.backward()
    near(loss.detach()[None], t["loss"], 1e-6, "loss")
    for name, weight in model.backbone.named_parameters():
        near(weight.grad, t[f"grad.{name}"], 2e-5, f"grad.{name}")
        compared |= {f"grad.{name}", f"base.{name}"}
    assert compared == t.keys(), sorted(compared ^ t.keys())


def given_choices(model: Any, case: Case, calls: Iterator[int], seen: set[str]) -> None:
    """Compare every choice with the reference's, which is taken in layer 0 where it ties."""
    memory = model.memories["landmark"]
    own, current = memory.choose, {"call": -1}
    tied = case.settings["layer0_ties"]

    def choose(layer: int, scores: Tensor) -> Tensor:
        name = f"selected.{layer}.{current['call']}"
        want = case.tensors[name].long()
        got = own(layer, scores)
        if want.shape[-1] < got.shape[-1]:  # fewer blocks are there: the rest is none
            none = torch.full_like(got[..., want.shape[-1] :], scores.shape[-1])
            want = torch.cat([want, none], -1)
        assert got.shape == want.shape, name
        if not (tied and layer == 0):
            assert torch.equal(got, want), f"{name}: another choice"
        seen.add(name)
        return want

    def next_call(*_: Any) -> None:
        current["call"] = next(calls)

    memory.choose = choose
    model.get_decoder().register_forward_pre_hook(next_call)


def anchored(model: Any, state: Any, other: Any, m: int) -> Any:
    """The state as the published code goes on from it: from its second call on, the complete blocks
    of an unfinished chunk are stored and positions count from the incomplete one.

    memwrap's segments do not move once they are open; here their blocks are closed by hand.
    """
    cut = int(state.fill[0]) // m * (m + 1)
    blocks = state.clone()
    blocks.open = state.open.map(lambda x: x[:, :, :cut], lambda x: x[:, :cut])
    blocks.fill = state.fill // m * m
    new = model.close_segment(blocks)
    rest = state.open.map(lambda x: x[:, :, cut:], lambda x: x[:, cut:])
    now = rest.positions - cut
    for layer, key in rest.tree["keys"].items():
        angles = [model.parts.rotary.angles(p, int(layer), key) for p in (rest.positions, now)]
        rest.tree["keys"][layer] = rotate(unrotate(key, angles[0]), angles[1])
    new.open = replace(rest, positions=now)
    new.fill, new.signature = state.fill % m, other.signature()
    return new


@torch.no_grad()
def infer(case: Case, predicts: bool, seen: set[str]) -> None:
    """The prompt in chunks, then token by token, each step a segment of one block."""
    settings, t = case.settings, case.tensors
    m, prompt = settings["mem_freq"], settings["prompt_tokens"]
    own = {
        "top_k": settings["top_k"], "retrieval": MODES[settings["mode"]], "cache_size": None,
        "landmark_in_loss": predicts,
    }  # fmt: skip
    assert settings["chunk_tokens"] % settings["block"] == 0 and settings["block"] == m + 1
    chunk = settings["chunk_tokens"] // settings["block"] * m
    reader, writer = (model_of(case, size, **own) for size in (chunk, m))
    calls = iter(range(len(t["call_lengths"])))
    for model in (reader, writer):
        given_choices(model, case, calls, seen)
    text = t["input_ids"]
    out = reader(text[:, :prompt])
    pieces, state = [out.logits], anchored(reader, out.cache, writer, m)
    for token in text[:, prompt:].split(1, 1):
        pieces.append(writer(token, cache=state).logits)
    assert next(calls, None) is None, "a call was not made"
    got = torch.cat(pieces, 1)
    near(got, t["logits_with_landmarks"][:, places_of(text.shape[1], m)[predicts]], 5e-5, "logits")
    if not predicts:
        near(got, t["logits"], 5e-5, "logits")
        fed = torch.full_like(t["ids_fed"], settings["landmark_id"])
        fed[:, places_of(text.shape[1], m)[0]] = text
        assert torch.equal(fed, t["ids_fed"])


def infer_both(case: Case) -> None:
    """Logits at tokens and, in a second run, at landmarks: the flag changes nothing else."""
    case.known(
        *BASE, "mem_freq", "block", "landmark_id", "train_context_length", "top_k", "chunk_tokens",
        "mode", "include_landmark_in_loss", "prompt_tokens", "decode_steps", "layer0_ties",
        "score_gap_min_layer0", "score_gap_min_layer1",
    )  # fmt: skip
    seen = {"input_ids", "call_lengths", "ids_fed", "logits", "logits_with_landmarks"}
    for predicts in (False, True):
        infer(case, predicts, seen)
    rest = {n for n in case.tensors if not n.startswith("base.")} ^ seen
    assert not rest, sorted(rest)


RUNNERS = {
    "op_attn": attend, "op_retrieval": retrieve, "model_train": train, "model_infer": infer_both,
}  # fmt: skip


@pytest.mark.parametrize("name", names_of("landmark"))
def test_case(name: str) -> None:
    case = read_case("landmark", name)
    kind = "_".join(name.split("_")[:2])
    assert kind in RUNNERS, f"{name}: a case of another kind"
    RUNNERS[kind](case)
