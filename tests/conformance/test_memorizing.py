"""Conformance of memorizing attention: every case in the folder, through the ops and the memory's
own softmaxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, compare, names_of, read_case
from torch import Tensor

from memwrap.ops import backend, retrieve
from memwrap.ops.buffers import filled, ring

TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
PUBLIC = {"to_q.weight", "to_kv.weight", "to_out.weight", "scale"}


def rotated(x: Tensor) -> Tensor:
    """RoPE over half-split channels, theta 10000, positions from 0."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency)
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


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


def run_gated(case: Case) -> dict[str, Tensor]:
    """The paper's two softmaxes and the gate, segment by segment."""
    case.known("variant", "batch", "heads", "kv_heads", "dim_head", "segment_lengths", "top_k",
               "capacity", "normalize", "rope")  # fmt: skip
    settings, t = case.settings, case.tensors
    names = [n for n in ("q", "k", "v", "gate_bias", "log_scale") if f"grad.{n}" in t]
    leaves = {n: t[n].clone().requires_grad_() for n in names}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    scale = torch.full((q.shape[1],), q.shape[-1] ** -0.5, dtype=q.dtype)
    if settings["normalize"]:
        q, k, scale = retrieve.normalise(q), retrieve.normalise(k), leaves["log_scale"].exp()
    cache, outs, results, start = Cache(k, v, settings["capacity"]), [], {}, 0
    for s, length in enumerate(settings["segment_lengths"]):
        part = slice(start, start + length)
        start += length
        if "clear_before" in t:
            cache.clear(t["clear_before"][s].bool())
        own = [x[:, :, part] for x in (q, k, v)]
        turned = [rotated(x) if settings["rope"] else x for x in own[:2]]
        values = own[2].repeat_interleave(q.shape[1] // k.shape[1], 1)
        near = local_scores(*turned, scale).softmax(-1) @ values
        read = retrieve.attend(
            own[0], cache.key, cache.value, cache.valid, settings["top_k"], scale=scale
        )
        gate = torch.sigmoid(leaves["gate_bias"])[:, None, None]
        gate = torch.where((cache.count > 0).view(-1, 1, 1, 1), gate, 0.0)
        outs.append(gate * read.out + (1 - gate) * near)
        if f"topk_index_{s + 1}" in t:
            ages = cache.ages(read.index)
            missing = settings["top_k"] - ages.shape[-1]
            results[f"topk_index_{s + 1}"] = F.pad(ages, (0, missing), value=-1)
        cache.add(own[1], own[2])
    results["out"] = torch.cat(outs, 2)
    results["loss"] = (results["out"] * t["loss_weight"]).sum()[None]
    results["loss"].sum().backward()
    return results | {f"grad.{n}": x.grad for n, x in leaves.items()}  # type: ignore[misc]


def run_joint(case: Case) -> dict[str, Tensor]:
    """The public variant: one KV head, one softmax, and a window of keys before the segment."""
    case.known("variant", "batch", "dim", "heads", "kv_heads", "dim_head", "segment_length",
               "segments", "top_k", "xl_max_memories")  # fmt: skip
    settings, t = case.settings, case.tensors
    leaves = {n: t[f"param.{n}"].clone().requires_grad_() for n in PUBLIC}
    inputs = [t[f"x_{s + 1}"].clone().requires_grad_() for s in range(settings["segments"])]
    heads, width, xl = settings["heads"], settings["dim_head"], settings["xl_max_memories"]
    scale = leaves["scale"].flatten().exp()
    empty = torch.zeros(settings["batch"], 1, 0, width)
    cache, past, results = Cache(empty, empty, 10_000), (empty, empty), {}
    loss = torch.zeros(())
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
        out = share * read.out + (scores - total[..., None]).exp() @ values.expand(
            -1, heads, -1, -1
        )
        out = out.transpose(1, 2).flatten(2) @ leaves["to_out.weight"].T
        results[f"out_{s + 1}"] = out
        loss = loss + (out * t[f"loss_weight_{s + 1}"]).sum()
        leaving = keys.shape[2] - xl
        if leaving > 0:
            cache.add(keys[:, :, :leaving], values[:, :, :leaving])
        past = keys[:, :, max(leaving, 0) :].detach(), values[:, :, max(leaving, 0) :].detach()
    loss.backward()
    results |= {f"grad.x_{s + 1}": x.grad for s, x in enumerate(inputs)}  # type: ignore[misc]
    results |= {f"grad.{n}": p.grad for n, p in leaves.items()}  # type: ignore[misc]
    return results | {"store_keys_final": cache.key, "store_values_final": cache.value}


def run(case: Case) -> dict[str, Tensor]:
    variant = case.settings.get("variant")
    if case.about["level"] == "op" and variant in ("gated", "joint_softmax"):
        return run_gated(case) if variant == "gated" else run_joint(case)
    pytest.fail(f"{case.name}: not understood; it holds {sorted(case.tensors)}")


def outputs(name: str) -> list[str]:
    """Results whose names do not say so themselves."""
    numbered = [f"{n}_{s}" for n in ("topk_index", "out") for s in range(9)]
    return ["out", "loss", "store_keys_final", "store_values_final", *numbered]


@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("memorizing"))
def test_memorizing(name: str, ops: str) -> None:
    case = read_case("memorizing", name, outputs(name))
    case.given("q", "k", "v", "gate_bias", "log_scale", "loss_weight", "clear_before",
               *(f"param.{n}" for n in PUBLIC),
               *(f"{n}_{s}" for n in ("x", "loss_weight") for s in range(9)))  # fmt: skip
    with backend(ops):
        compare(case, run(case), {"": TOLERANCES[case.about["dtype"]]})


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {"variant": "strange"}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("memorizing", "strange", about, {"out": torch.ones(1)}))
