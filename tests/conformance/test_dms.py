"""Conformance of DMS: every case, by the plain statement and by the memory, fed in segments of any
size, with the sets of keys that it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    Case,
    Got,
    Tolerances,
    both_precisions,
    compare,
    gradients_of,
    names_of,
    read_case,
)
from one_layer import OneLayer
from torch import Tensor, nn

import memwrap
from memwrap.ops import delayed_eviction as ops

# Logits are 1000 times what float32 rounds; sums of 20 keys.
TOLERANCES = Tolerances(
    reference={"": 1e-9}, float32={"": 5e-6, "grad": 2e-5}, exact={"": 1e-12, "grad": 1e-11}
)
STILL = 1e-30  # positions so small that nothing is rotated: the vectors are rotated already


class Given(nn.Module):
    """A decision map that is given its result as hidden states."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.transpose(1, 2)


class Layer(OneLayer):
    """The memory with decisions `(B, T, G)` that are given, and noise `(B, G, T)`."""

    def __init__(self, case: Case, window: int, raw: Tensor, noise: Tensor | None = None) -> None:
        batch, kv_heads, _, width = case.tensors["k"].shape
        config = memwrap.DMSConfig(window_size=window, noise=noise is not None)
        super().__init__(
            config, case.tensors["q"].shape[1], kv_heads, width, batch, dtype=case.dtype,
            distance_scale=STILL,
        )  # fmt: skip
        self.raw, self.noise = raw, noise
        self.memory.maps["0"] = Given()
        self.memory.train(noise is not None)

    def fed(self, inputs: list[Tensor], valid: Tensor, size: int) -> Tensor:
        """Read everything in segments, all of them closed: `(B, H, T, D)`."""
        outputs = []
        attend, total = self.memory.attend, valid.shape[1]
        for first in range(0, total, size):
            part = slice(first, first + size)

            def given(layer: int, attention: Any, state: Any, part: slice = part) -> Any:
                attention.hidden = self.raw[:, part]
                return attend(layer, attention, state)

            self.memory.attend = given
            with pytest.MonkeyPatch.context() as patch:
                noise = None if self.noise is None else self.noise[..., part]
                patch.setattr(ops, "logistic_noise", lambda like, noise=noise: noise)
                outputs.append(self.attend(*(x[:, :, part] for x in inputs), valid[:, part]))
                self.close()
        self.memory.attend = attend
        return torch.cat(outputs, 2)

    def held(self, row: int, head: int, pads: int) -> Tensor:
        """Numbers, in the text's columns, of the keys that are kept."""
        tree, size = self.state, self.state["recent"]["key"].shape[2]
        kept = tree["kept_place"][row, head, : tree["kept_count"][row, head]]
        near = torch.arange(-min(size, int(tree["tokens"][row])), 0)
        return torch.cat([kept.long(), near]) + tree["tokens"][row] + pads


def inference(case: Case) -> Got:
    s, tensors = case.settings, case.tensors
    inputs, valid = [tensors[n] for n in "qkv"], tensors["valid"] > 0
    decisions, window, case_says = tensors["decisions"], s["window"], case.says
    assert "window keys, ONE FEWER" in case_says
    batch, heads, total = decisions.shape
    case.holds(
        B=batch, query_heads=inputs[0].shape[1], kv_heads=heads, T=total,
        head_dim=inputs[0].shape[-1], padding=not bool(valid.all()),
    )  # fmt: skip
    case.aside("seed")
    raw = (2 * decisions - 1).to(case.dtype).transpose(1, 2)
    keys, _ = ops.about_keys(ops.hard_bias(decisions.to(case.dtype) - 0.5), valid)
    out = [ops.naive(*inputs, keys, window, valid)]
    pads = (~valid).sum(1).tolist()
    kept: dict[str, list[Tensor]] = {}
    for size in (total, 7, 3, 1):
        layer = Layer(case, window, raw)
        found = layer.fed(inputs, valid, size)
        out.append(found * valid[:, None, :, None])
        for row in range(batch):
            for head in range(heads):
                held = layer.held(row, head, pads[row])
                kept.setdefault(f"kept.{row}.{head}", []).append(held)
    until = ops.visible_until(decisions, window)
    return {"o": out, "visible_until": until, **kept}


def training(case: Case) -> Got:
    s, tensors = case.settings, case.tensors
    leaves = case.leaves("q", "k", "v", "a")
    raw, noise = leaves["a"], tensors["noise"]
    batch, total, heads = raw.shape
    case.holds(
        B=batch, query_heads=leaves["q"].shape[1], kv_heads=heads, T=total,
        head_dim=leaves["q"].shape[-1], alpha_scale=ops.SCALE, offset=ops.OFFSET,
    )  # fmt: skip
    case.aside("seed")
    # In training the public window has a key more than afterwards.
    window, tau, target = s["window"] + 1, s["tau"], s["target_fraction"]
    assert target == ops.target_share(2.0)
    valid = torch.ones(batch, total, dtype=torch.bool)
    logits = ops.decision_logits(raw.transpose(1, 2), tau, noise)
    share = ops.dropped_share(logits, valid)
    loss = (target - share).clamp_min(0).mean()
    bias, _ = ops.about_keys(ops.soft_bias(logits), valid)
    made = [leaves[n] for n in "qkv"]
    got: dict[str, list[Tensor]] = {"o": [ops.naive(*made, bias, window, valid)]}
    for size in (total, 5, 1):
        layer = Layer(case, window, raw, noise)
        assert layer.memory.config.temperature == tau
        got["o"].append(layer.fed(made, valid, size))
    for out in got["o"]:
        for leaf in leaves.values():
            leaf.grad = None
        ((out * tensors["do"]).sum() + loss).backward(retain_graph=True)
        for name, grad in gradients_of(leaves).items():
            got.setdefault(name, []).append(grad.clone())
    # Nothing is decided about the last key; the case calls that a logit of 0.
    pending, _ = ops.about_keys(ops.soft_bias(logits), valid, math.log(0.5))
    return {
        **got, "logits": logits, "decisions": ops.decisions_of(logits), "bias": pending,
        "frac": share, "dms_loss": loss,
    }  # fmt: skip


def check(case: Case) -> None:
    kinds = {"train": training, "infer": inference}
    kind = kinds.get(case.name.split("_")[0])
    if kind is None or case.level != "op":
        case.not_understood()
    compare(case, kind(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", names_of("dms"))
def test_dms(name: str, dtype: torch.dtype) -> None:
    check(read_case("dms", name, dtype))
