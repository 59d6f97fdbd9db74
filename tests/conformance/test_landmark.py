"""Conformance of landmark attention: every case, op and model, with the choice of blocks exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import backbone_of, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from torch import Tensor

import memwrap
from memwrap.backbones.rotary import Rotation, rotate
from memwrap.ops import landmark as ops

MODES = {"per_token_and_head": "token", "max_over_tokens": "call"}
OP = Tolerances(
    exact={"": 1e-13},
    reference={"": 2e-6, "grad_": 2e-6},
    float32={"": 2e-6, "grad_": 5e-6},
)
MODEL = Tolerances(
    reference={"": 2e-5, "loss": 1e-6, "grad.": 2e-5},
    float32={"": 2e-5, "loss": 1e-6, "grad.": 2e-5},
)


# Ops


def attend(case: Case) -> Got:
    leaves, t = case.leaves("q", "k", "v"), case.tensors
    q, k, v = leaves.values()
    marks, period = t["is_landmark"].bool(), case.settings["landmark_period"]
    case.holds(
        B=len(q), H=q.shape[1], Tq=q.shape[2], Tk=k.shape[2], d=q.shape[3],
        score_scale="1/sqrt(d)",
        irregular=None if period else [row.nonzero().flatten().tolist() for row in marks],
    )  # fmt: skip
    case.aside("seed", "fused_triton_interpret_max_abs_diff")
    seen = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    probs, _ = ops.grouped_softmax(scores, marks, seen.expand(len(q), -1, -1))
    outs = [probs @ v]
    if period:
        place = torch.arange(k.shape[2])
        assert torch.equal(marks, (place % period == period - 1).expand_as(marks))
        for backend in ("naive", "torch"):
            with memwrap.ops.backend(backend):
                outs.append(ops.attention(q, k, v, period - 1)[0])
    weights = t["loss_weight"]
    found = [torch.autograd.grad((o * weights).sum(), (q, k, v), retain_graph=True) for o in outs]
    gradients = {f"grad_{n}": x for n, x in zip("qkv", zip(*found, strict=True), strict=True)}
    return {"probs": probs, "out": outs, **gradients}


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """`(1, H, T, D)` rotated at `(T,)`."""
    width = x.shape[-1]
    rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = (positions[:, None].double() * rates).repeat(1, 2)[None]
    halves = Rotation.halves(x.shape[-1])
    return rotate(x, halves.angles(angles.cos().to(x.dtype), angles.sin().to(x.dtype)))


def retrieve(case: Case) -> Got:
    """One layer that is fed call by call, with memwrap's ops."""
    settings, t = case.settings, case.tensors
    m, top_k, theta = settings["mem_freq"], settings["top_k"], settings["rope_theta"]
    keys, values, queries = t["k"], t["v"], t["q"]
    size, width = m + 1, queries.shape[3]
    case.holds(
        H=queries.shape[1], head_dim=width, block=size,
        landmark_rule="index % block == mem_freq", call_lengths=t["call_lengths"].tolist(),
    )  # fmt: skip
    case.aside("seed", "topk_margin_min", "offload_cache_to_cpu")
    start, outs, got = 0, [], {}
    for call, length in enumerate(settings["call_lengths"]):
        first = start // size * size  # what stands before is in complete blocks
        q, places = queries[:, :, start : start + length], torch.arange(start, start + length)
        k, v = (x[:, :, first : start + length] for x in (keys, values))
        local = ops.attention(
            rope(q, places - first, theta), rope(k, torch.arange(k.shape[2]), theta), v, m
        )
        start += length
        if not first:
            outs.append(local[0])
            continue
        count = first // size
        have = torch.full((len(q),), count)
        inside = torch.arange(first) % size
        blocks = rope(keys[:, :, :first], inside, theta).unflatten(2, (count, size))
        turns = ops.queries_for(m, top_k, places[None] - first)
        slots = q[:, :, :, None].expand(-1, -1, -1, top_k + 1, -1).flatten(2, 3)
        slots = rope(slots, turns.flatten(), theta).unflatten(2, (length, -1))
        scores = ops.block_scores(slots, blocks[..., m, :], have, width**-0.5)
        if case.among("mode", MODES) == "call":
            scores = ops.shares(scores).amax(2, keepdim=True)
        ids = ops.choose(scores, top_k)
        got[f"selected.{call}"] = ids
        back = ops.read_slots(ids, have, top_k) - 1
        own = slots.gather(3, back[..., None].expand(*slots.shape[:3], -1, width))
        valid = torch.ones(len(q), count, m, dtype=torch.bool)
        held = values[:, :, :first].unflatten(2, (count, size))
        args = (blocks[..., :m, :], held[..., :m, :], blocks[..., m, :], valid, ids, width**-0.5)
        outs.append(ops.merge(local, ops.retrieved(own, *args)))
    return {**got, "out": torch.cat(outs, 2)}


# Models


def model_of(case: Case, segment_size: int, **settings: Any) -> Any:
    config = memwrap.LandmarkConfig(
        segment_size=segment_size, block_size=case.settings["mem_freq"],
        landmark_id=case.settings["landmark_id"], first_layer=True, **settings,
    )  # fmt: skip
    return memwrap.wrap(backbone_of(case, sizes_of(case.settings)), config)


def places_of(total: int, m: int) -> tuple[Tensor, Tensor]:
    """Where real tokens stand among landmarks, and where what follows each is predicted if the
    landmark predicts."""
    index = torch.arange(total)
    places = index + index // m
    return places, places + (index % m == m - 1).long()


def train(case: Case) -> Got:
    settings, text, m = case.settings, case.tensors["input_ids"], case.settings["mem_freq"]
    case.holds(B=len(text), T=text.shape[1], block=m + 1)
    case.aside("fused_kernel")
    predicted, total, got = settings["include_landmark_in_loss"], text.shape[1], Got()
    both = {
        # The text leaves its segment open: no landmark stands behind the last token.
        flag: model_of(case, total + 1, landmark_in_loss=flag)
        for flag in (False, True)[: 1 + predicted]
    }
    want = case.want("logits")
    with torch.no_grad():
        own = {flag: model(text).logits for flag, model in both.items()}
    if predicted:  # the reference has the landmarks' logits too
        ids = torch.full_like(case.want("input_ids_with_landmarks"), settings["landmark_id"])
        ids[:, places_of(total, m)[0]] = text
        got |= {"input_ids_with_landmarks": ids, "logits": at_places(own, want, total, m)}
    else:
        got["logits"] = own[False]
    model = both[predicted].train()
    loss = model(text, labels=text).loss
    loss.backward()
    weights = model.backbone.named_parameters()
    return got | {"loss": loss} | {f"grad.{n}": w.grad for n, w in weights}


def at_places(own: dict[bool, Tensor], want: Tensor, total: int, m: int) -> list[Tensor]:
    """The reference's logits with landmarks, ours put in at the places that each way predicts at;
    a landmark behind the last token is not there in training."""
    filled = []
    for flag, logits in own.items():
        places = places_of(total, m)[flag]
        there = places < want.shape[1]
        both = want.clone()
        both[:, places[there]] = logits[:, there]
        filled.append(both)
    return filled


def given_choices(model: Any, case: Case, calls: Iterator[int], got: dict[str, Any]) -> None:
    """Note every choice; where layer 0 ties, the reference's is taken and nothing is compared."""
    memory = model.memories["landmark"]
    own, current = memory.choose, {"call": -1}
    tied = case.settings["layer0_ties"]

    def choose(layer: int, scores: Tensor) -> Tensor:
        name = f"selected.{layer}.{current['call']}"
        want, found = case.want(name).long(), own(layer, scores)
        count = want.shape[-1]
        # Fewer blocks are there than are looked for: the rest is none.
        none = torch.full_like(found[..., count:], scores.shape[-1])
        taken = want if tied and layer == 0 else found[..., :count]
        assert taken is want or torch.equal(found[..., count:], none), name
        got.setdefault(name, []).append(taken)
        return torch.cat([want, none], -1)

    def next_call(*_: Any) -> None:
        current["call"] = next(calls)

    memory.choose = choose
    model.get_decoder().register_forward_pre_hook(next_call)


def anchored(model: Any, state: Any, other: Any, m: int) -> Any:
    """The state as the published code goes on from it: from its second call on, the complete blocks
    of an unfinished chunk are stored and positions count from the incomplete one.

    memwrap's segments do not move once they are open; here their blocks are closed by hand.
    """
    if not int(state.fill[0]) % m:  # it has complete blocks alone, or none
        new = model.close_segment(state) if int(state.fill[0]) else state.clone()
        new.signature = other.signature()
        return new
    cut = int(state.fill[0]) // m * (m + 1)
    blocks = state.clone()
    blocks.open = state.open.map(lambda x: x[:, :, :cut], lambda x: x[:, :cut])
    blocks.fill = state.fill // m * m
    new = model.close_segment(blocks)
    rest = state.open.map(lambda x: x[:, :, cut:], lambda x: x[:, cut:])
    now = rest.positions - cut
    for layer, key in rest.tree["keys"].items():
        angles = [model.parts.rotary.angles(p, int(layer), key) for p in (rest.positions, now)]
        rest.tree["keys"][layer] = rotate(key, angles[1].behind(angles[0].inverse()))
    new.open = replace(rest, positions=now)
    new.fill, new.signature = state.fill % m, other.signature()
    return new


@torch.no_grad()
def infer(case: Case, predicts: bool, got: dict[str, Any]) -> Tensor:
    """The prompt in chunks, then token by token, each step a segment of one block."""
    settings, text, m = case.settings, case.tensors["input_ids"], case.settings["mem_freq"]
    own = {
        "top_k": settings["top_k"], "retrieval": case.among("mode", MODES), "cache_size": None,
        "landmark_in_loss": predicts,
    }  # fmt: skip
    reader = model_of(case, settings["chunk_tokens"] // (m + 1) * m, **own)
    writer = model_of(case, m, **own)
    calls = iter(range(len(case.tensors["call_lengths"])))
    for model in (reader, writer):
        given_choices(model, case, calls, got)
    prompt = settings["prompt_tokens"]
    out = reader(text[:, :prompt])
    pieces, state = [out.logits], anchored(reader, out.cache, writer, m)
    for token in text[:, prompt:].split(1, 1):
        pieces.append(writer(token, cache=state).logits)
    assert next(calls, None) is None, "a call was not made"
    return torch.cat(pieces, 1)


def infer_both(case: Case) -> Got:
    """Logits at tokens and, in a second run, at landmarks: the flag changes nothing else."""
    settings, text, m = case.settings, case.tensors["input_ids"], case.settings["mem_freq"]
    size, context = m + 1, settings["train_context_length"]
    case.holds(
        block=size, decode_steps=text.shape[1] - settings["prompt_tokens"],
        chunk_tokens=context - context % size - (settings["top_k"] + 1) * size,
    )  # fmt: skip
    case.aside("score_gap_min_layer0", "score_gap_min_layer1")
    got: dict[str, Any] = {}
    own = {flag: infer(case, flag, got) for flag in (False, True)}
    got["logits"] = own[False]
    # The text goes on with the tokens that one of the two ways would choose.
    chosen = own[settings["include_landmark_in_loss"]][
        :, settings["prompt_tokens"] - 1 : -1
    ].clone()
    chosen[..., settings["landmark_id"]] = -torch.inf
    assert torch.equal(chosen.argmax(-1), text[:, settings["prompt_tokens"] :])
    got["logits_with_landmarks"] = at_places(
        own, case.want("logits_with_landmarks"), text.shape[1], m
    )
    got["ids_fed"] = torch.full_like(case.want("ids_fed"), settings["landmark_id"])
    got["ids_fed"][:, places_of(text.shape[1], m)[0]] = text
    return got


def run(case: Case) -> Got:
    """Choose by what the case holds; what is not understood fails."""
    holds = case.tensors.keys()
    if case.level == "op" and "is_landmark" in holds:
        return attend(case)
    if case.level == "op" and "call_lengths" in holds:
        return retrieve(case)
    if case.level == "model" and "ids_fed" in holds:
        return infer_both(case)
    if case.level == "model" and "loss" in holds:
        return train(case)
    return case.not_understood()


def check(case: Case) -> None:
    compare(case, run(case), OP if case.level == "op" else MODEL)


@both_precisions
@pytest.mark.parametrize("name", names_of("landmark"))
def test_case(name: str, dtype: torch.dtype) -> None:
    check(read_case("landmark", name, dtype))
