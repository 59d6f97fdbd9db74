"""Conformance of memorizing attention: every case in the folder, through the ops and the memory's
own softmaxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from models import cuts_of
from one_layer import rotated_by_hand
from torch import Tensor

from memwrap.ops import backend, retrieve
from memwrap.ops.buffers import filled, ring

# A scale's gradient is a sum over all scores that nearly cancels: 3e-5 was met.
TOLERANCES = Tolerances(
    reference={"": 1e-5, "grad.": 2e-5},
    float32={"": 1e-5, "grad.": 2e-4},
)
WORDS = "theta 10000, positions 0..N-1 restart"  # of the rotation, which no setting holds


def local_scores(q: Tensor, k: Tensor, scale: Tensor, past: int = 0) -> Tensor:
    """Causal scores `(B, H, T, past + T)`; the first `past` keys are seen by all."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    length = q.shape[2]
    seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    scores = (q @ k.transpose(-1, -2)) * scale[:, None, None]
    return scores.masked_fill(~seen, torch.finfo(q.dtype).min)


class Cache:
    """The rings of one layer, written as the memory writes them."""

    def __init__(self, key: Tensor, value: Tensor, size: int) -> None:
        self.size = size
        self.key, self.value = key[:, :, :0], value[:, :, :0]
        self.count = torch.zeros(len(key), dtype=torch.long)

    @property
    def valid(self) -> Tensor:
        return filled(self.count, self.key.shape[2])

    def add(self, key: Tensor, value: Tensor) -> None:
        valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
        place = ring.slots(self.count, valid, self.size)
        self.count = self.count + valid.sum(1)
        capacity = ring.capacity(self.count, self.key.shape[2], self.size)
        self.key = ring.store(self.key, place, key.detach(), capacity)
        self.value = ring.store(self.value, place, value.detach(), capacity)

    def clear(self, rows: Tensor) -> None:
        """A document ends: the row goes on with a fresh state."""
        self.count = self.count.masked_fill(rows, 0)

    def ages(self, index: Tensor) -> Tensor:
        """Entries counted from the oldest, for places `(B, H, T, k)`; -1 for none."""
        number = ring.entries(self.count, self.key.shape[2], self.size)
        first = (self.count - self.size).clamp_min(0)
        age = (number - first[:, None]).gather(1, index.clamp_min(0).flatten(1))
        return age.view(index.shape).masked_fill(index < 0, -1)


def run_gated(case: Case) -> Got:
    """The paper's two softmaxes and the gate, segment by segment."""
    settings, t = case.settings, case.tensors
    leaves = case.leaves("q", "k", "v", "gate_bias", "log_scale")
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    case.holds(
        batch=len(q), heads=q.shape[1], kv_heads=k.shape[1], dim_head=q.shape[3],
    )  # fmt: skip
    scale = torch.full((q.shape[1],), q.shape[-1] ** -0.5, dtype=q.dtype)
    if settings["normalize"]:
        q, k, scale = retrieve.normalise(q), retrieve.normalise(k), leaves["log_scale"].exp()
    if settings["rope"]:
        assert WORDS in case.says, f"{case.name}: another rotation"
    cache, outs, results = Cache(k, v, settings["capacity"]), [], {}
    clear = case.given("clear_before")
    for s, part in enumerate(cuts_of(settings["segment_lengths"], q.shape[2])):
        if clear is not None:
            cache.clear(clear[s].bool())
        own = [x[:, :, part] for x in (q, k, v)]
        turned = [rotated_by_hand(x, 10000) if settings["rope"] else x for x in own[:2]]
        values = own[2].repeat_interleave(q.shape[1] // k.shape[1], 1)
        near = local_scores(*turned, scale).softmax(-1) @ values
        read = retrieve.attend(
            own[0], cache.key, cache.value, cache.valid, settings["top_k"], scale=scale
        )
        gate = torch.sigmoid(leaves["gate_bias"])[:, None, None]
        gate = torch.where((cache.count > 0).view(-1, 1, 1, 1), gate, 0.0)
        outs.append(gate * read.out + (1 - gate) * near)
        ages = cache.ages(read.index)
        missing = settings["top_k"] - ages.shape[-1]
        results[f"topk_index_{s + 1}"] = F.pad(ages, (0, missing), value=-1)
        cache.add(own[1], own[2])
    results["out"] = torch.cat(outs, 2)
    results["loss"] = (results["out"] * t["loss_weight"]).sum()
    results["loss"].backward()
    return {**results, **gradients_of(leaves)}


def run_joint(case: Case) -> Got:
    """The public variant: one KV head, one softmax, and a window of keys before the segment."""
    settings, t = case.settings, case.tensors
    leaves = {n: x.clone().requires_grad_() for n, x in case.starting("param.").items()}
    leaves |= case.leaves(*(f"x_{s + 1}" for s in range(settings["segments"])))
    inputs = [leaves[f"x_{s + 1}"] for s in range(settings["segments"])]
    heads, width, xl = settings["heads"], settings["dim_head"], settings["xl_max_memories"]
    case.holds(
        batch=len(inputs[0]), segment_length=inputs[0].shape[1], dim=inputs[0].shape[2], kv_heads=1
    )
    scale = leaves["scale"].flatten().exp()
    empty = torch.zeros(settings["batch"], 1, 0, width, dtype=case.dtype)
    cache, past, results = Cache(empty, empty, 10_000), (empty, empty), {}
    loss = torch.zeros((), dtype=case.dtype)
    for s, x in enumerate(inputs):
        q = (x @ leaves["to_q.weight"].T).unflatten(-1, (heads, width)).transpose(1, 2)
        k, v = (x @ leaves["to_kv.weight"].T)[:, None].split(width, -1)
        q, k = retrieve.normalise(q), retrieve.normalise(k)
        keys, values = (torch.cat(p, 2) for p in zip(past, (k, v), strict=True))
        read = retrieve.attend(
            q, cache.key, cache.value, cache.valid, settings["top_k"], scale=scale
        )
        scores = local_scores(q, keys, scale, past[0].shape[2])
        total = torch.logaddexp(read.logsumexp, scores.logsumexp(-1))
        share = (read.logsumexp - total).exp()[..., None]
        near = (scores - total[..., None]).exp() @ values.expand(-1, heads, -1, -1)
        out = (share * read.out + near).transpose(1, 2).flatten(2) @ leaves["to_out.weight"].T
        results[f"out_{s + 1}"] = out
        loss = loss + (out * t[f"loss_weight_{s + 1}"]).sum()
        leaving = keys.shape[2] - xl
        if leaving > 0:
            cache.add(keys[:, :, :leaving], values[:, :, :leaving])
        past = keys[:, :, max(leaving, 0) :].detach(), values[:, :, max(leaving, 0) :].detach()
    loss.backward()
    results |= gradients_of(leaves)
    return {**results, "store_keys_final": cache.key, "store_values_final": cache.value}


def run(case: Case) -> Got:
    variants = {"gated": run_gated, "joint_softmax": run_joint}
    variant = case.settings.get("variant")
    if case.level == "op" and variant in variants:
        return variants[variant](case)
    return case.not_understood()


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        compare(case, run(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("memorizing"))
def test_memorizing(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("memorizing", name, dtype), ops)
