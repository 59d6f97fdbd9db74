"""Conformance of the Compressive memory: every case, op and model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, names_of, read_case
from models import base_of, check, run, segment_size_of
from torch import Tensor

import memwrap
from memwrap.ops import compressive as ops
from memwrap.ops.buffers import take

KINDS = {"conv1d": "conv", "dilated_conv1d": "dilated_conv"}
TOLERANCES = {"": 2e-5, "grad.": 1e-4}


def run_model(case: Case) -> None:
    case.known(
        "base", "segment_lengths", "n_m", "n_cm", "compression_rate", "compression", "store",
        "positions",
    )  # fmt: skip
    settings = case.settings
    config = memwrap.CompressiveConfig(
        segment_size=segment_size_of(case),
        memory_size=settings["n_m"],
        compressed_size=settings["n_cm"],
        compression_rate=settings["compression_rate"],
        compression=settings["compression"],
        store=settings["store"],
        positions=settings["positions"],
    )
    model = memwrap.wrap(base_of(case), config)
    got = run(model, case, {})
    state = got.pop("state")
    total = case.tensors["input_ids"].shape[1]
    short = {"key": "k", "value": "v", "hidden": "h"}
    for layer, tree in state.memories["compressive"]["layers"].items():
        for part, name in (("compressed", "cmem"), ("memory", "mem")):
            own = tree[part]
            assert len(own["count"].unique()) == 1
            count = int(own["count"][0])
            for kind in own.keys() - {"count", "place"}:
                rows = own[kind][:, :, -count:]
                got[f"{name}_{short[kind]}_final.layer{layer}"] = rows
            got[f"{name}_positions_final"] = own["place"][0, -count:, 0] + total
    check(case, got, TOLERANCES)


class Layer:
    """The case's attention layer, driven with memwrap's ops over its segments."""

    def __init__(self, case: Case) -> None:
        self.case, self.settings = case, case.settings
        self.kind = KINDS.get(self.settings["compression"], self.settings["compression"])
        self.p = {
            n.removeprefix("param."): t.clone().requires_grad_()
            for n, t in case.tensors.items()
            if n.startswith("param.")
        }
        self.heads, self.rate = self.settings["heads"], self.settings["compression_rate"]
        self.mem = self.cmem = torch.zeros(
            self.settings["batch"], 0, self.settings["dim"], dtype=torch.float64
        )
        self.got: dict[str, Tensor] = {}
        self.losses: dict[str, Any] = {"main": 0.0, "aux": 0.0, "ae": 0.0}

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, rows: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        weight = self.p["to_kv.weight"]
        out = rows @ (weight.detach() if frozen else weight).T
        return tuple(self.split(part) for part in out.chunk(2, -1))  # type: ignore[return-value]

    def step(self, index: int) -> None:
        x = self.case.tensors[f"x_{index}"].clone().requires_grad_()
        self.x = {**getattr(self, "x", {}), index: x}
        q = self.split(x @ self.p["to_q.weight"].T)
        k, v = self.keys(torch.cat([self.cmem, self.mem, x], 1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        length, before = x.shape[1], k.shape[2] - x.shape[1]
        if "pos_emb" in self.p:
            table = self.p["pos_emb"][:, -k.shape[2] :]
            place = torch.arange(k.shape[2])[None] + length - 1 - torch.arange(length)[:, None]
            known = place < k.shape[2]
            relative = table[:, place.clamp_max(k.shape[2] - 1)]
            terms = torch.einsum("bhid,hijd->bhij", q, relative) / q.shape[-1] ** 0.5
            scores = scores + terms * known
        seen = torch.ones(length, k.shape[2], dtype=torch.bool).tril(before)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        merged = (weights @ v).transpose(1, 2).flatten(2)
        out = merged @ self.p["to_out.weight"].T + self.p["to_out.bias"]
        self.got[f"out_{index}"] = out
        self.losses["main"] += (out * self.case.tensors[f"loss_weight_{index}"]).sum()
        self.forget(index, x.detach(), q, weights.detach())

    def forget(self, index: int, x: Tensor, q: Tensor, weights: Tensor) -> None:
        pool = torch.cat([self.mem, x], 1)
        count = max(0, pool.shape[1] - self.settings["n_m"]) // self.rate * self.rate
        old, self.mem = pool[:, :count], pool[:, count:]
        if count:
            usage = weights.mean((1, 2))[:, self.cmem.shape[1] :][:, :count]
            new = self.compress(index, old, usage)
            self.cmem = torch.cat([self.cmem, new.detach()], 1)[:, -self.settings["n_cm"] :]
            self.got |= {f"evicted_{index}": old, f"new_cm_{index}": new}
            self.teach(index, q, old, new)
        for name in ("mem", "cmem"):
            if f"{name}_{index}" in self.case.tensors:
                self.got[f"{name}_{index}"] = getattr(self, name)

    def compress(self, index: int, old: Tensor, usage: Tensor) -> Tensor:
        if self.kind == "most_used":
            self.got[f"usage_{index}"] = usage
            evicted = torch.full((len(old),), old.shape[1])
            chosen, keep = ops.most_used(usage, evicted, self.rate)
            assert (keep == chosen.shape[1]).all()
            return take(old, chosen)
        weight, bias = self.p.get("compress.weight"), self.p.get("compress.bias")
        own = {} if weight is None else {"weight": weight[None], "bias": bias[None]}  # type: ignore[index]
        return ops.compress(old[:, None], self.rate, self.kind, **own)[:, 0]

    def teach(self, index: int, q: Tensor, old: Tensor, new: Tensor) -> None:
        scaling = q.shape[-1] ** -0.5
        rows = [
            (*self.keys(r, frozen=True), torch.ones(r.shape[:2], dtype=torch.bool))
            for r in (old, new)
        ]
        loss = ops.reconstruction(q, *rows, scaling=scaling).mean()
        self.losses["aux"] += loss
        self.got[f"aux_mse_{index}"] = loss[None]
        self.got[f"aux_l2_{index}"] = (loss * q.numel()).sqrt()[None]
        if "decoder.weight" in self.p:
            weight, bias = self.p["decoder.weight"][None], self.p["decoder.bias"][None]
            rebuilt = ops.decompress(new[:, None], weight, bias)
            valid = torch.ones(old.shape[:2], dtype=torch.bool)
            loss = ops.autoencoding(old[:, None], rebuilt, valid).mean()
            self.losses["ae"] += loss
            self.got[f"ae_mse_{index}"] = loss[None]

    def finish(self) -> None:
        for name in self.case.tensors:
            if not name.startswith("grad_"):
                continue
            loss, _, what = name.removeprefix("grad_").partition(".")
            source = self.x[int(what[2:])] if what.startswith("x_") else self.p[what]
            (gradient,) = torch.autograd.grad(self.losses[loss], source, retain_graph=True)
            self.got[name] = gradient
        if "compress.weight" in self.p:  # only the compressor learns from its loss
            others = [self.p[n] for n in ("to_q.weight", "to_kv.weight")]
            found = torch.autograd.grad(
                self.losses["aux"], others, retain_graph=True, allow_unused=True
            )
            assert all(g is None for g in found)


def run_op(case: Case) -> None:
    case.known(
        "batch", "heads", "dim", "segment_lengths", "n_m", "n_cm", "compression_rate",
        "compression", "dilation", "decoder", "relative_positions",
    )  # fmt: skip
    dilated = case.settings["compression"] == "dilated_conv1d"
    assert case.settings["dilation"] == (ops.DILATION if dilated else 1)
    layer = Layer(case)
    for index in range(1, len(case.settings["segment_lengths"]) + 1):
        layer.step(index)
    layer.finish()
    inputs = ("param.", "x_", "loss_weight_")
    expected = {n for n in case.tensors if not n.startswith(inputs)}
    assert layer.got.keys() >= expected, sorted(expected - layer.got.keys())
    for name in sorted(expected):
        torch.testing.assert_close(
            layer.got[name].detach(), case.tensors[name], rtol=1e-9, atol=1e-9, msg=name
        )


@pytest.mark.parametrize("name", names_of("compressive"))
def test_case(name: str) -> None:
    case = read_case("compressive", name)
    {"op": run_op, "model": run_model}[case.about["level"]](case)
