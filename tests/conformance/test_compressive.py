"""Conformance of the Compressive memory: every case, op and model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone_of, base_gradients, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from models import read, size_for
from torch import Tensor

import memwrap
from memwrap.ops import compressive as ops
from memwrap.ops.buffers import take

KINDS = {
    "mean": "mean", "max": "max", "most_used": "most_used", "conv1d": "conv",
    "dilated_conv1d": "dilated_conv",
}  # fmt: skip
TOLERANCES = Tolerances(
    reference={"": 2e-5, "grad.": 2e-5},
    float32={"": 2e-5, "grad.": 2e-5},
)
FIELDS = {
    "n_m": "memory_size", "n_cm": "compressed_size", "compression_rate": "compression_rate",
    "store": "store", "positions": "positions",
}  # fmt: skip
SHORT = {"key": "k", "value": "v", "hidden": "h"}


def run_model(case: Case) -> Got:
    ids, lengths = case.tensors["input_ids"], case.settings["segment_lengths"]
    config = memwrap.CompressiveConfig(
        segment_size=size_for(lengths),
        compression=case.among("compression", KINDS),
        bptt_segments=1,
        **{ours: case.settings[theirs] for theirs, ours in FIELDS.items()},
    )
    model = memwrap.wrap(backbone_of(case, sizes_of(case.settings["base"])), config)
    logits, loss, state = read(model, ids, lengths, detach=True)
    loss.backward()
    got = {"logits": logits, "loss_next_token": loss}
    for layer, tree in state.memories["compressive"]["layers"].items():
        for part, name in (("compressed", "cmem"), ("memory", "mem")):
            own = tree[part]
            (count,) = own["count"].unique().tolist()
            for kind in own.keys() - {"count", "place"}:
                rows = own[kind][:, :, own[kind].shape[2] - count :]
                got[f"{name}_{SHORT[kind]}_final.layer{layer}"] = rows
            places = own["place"][0, len(own["place"][0]) - count :, 0]
            got[f"{name}_positions_final"] = places + ids.shape[1]
    return got | base_gradients(model, case)


class Layer:
    """The case's attention layer, driven with memwrap's ops over its segments."""

    def __init__(self, case: Case) -> None:
        self.case, self.settings, self.kind = case, case.settings, case.among("compression", KINDS)
        weights = case.starting("param.")
        self.p = {n: t.clone().requires_grad_() for n, t in weights.items()}
        case.holds(
            dim=len(self.p["to_q.weight"]), decoder="decoder.weight" in self.p,
            relative_positions="pos_emb" in self.p,
        )  # fmt: skip
        if self.kind != "dilated_conv":
            case.holds(dilation=1)
        self.heads, self.rate = self.settings["heads"], self.settings["compression_rate"]
        self.mem = self.cmem = torch.zeros(
            self.settings["batch"], 0, self.settings["dim"], dtype=case.dtype
        )
        self.x: dict[int, Tensor] = {}
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
        self.x[index] = x
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
            self.got[f"{name}_{index}"] = getattr(self, name)

    def compress(self, index: int, old: Tensor, usage: Tensor) -> Tensor:
        if self.kind == "most_used":
            self.got[f"usage_{index}"] = usage
            evicted = torch.full((len(old),), old.shape[1])
            chosen, keep = ops.most_used(usage, evicted, self.rate)
            assert (keep == chosen.shape[1]).all()
            return take(old, chosen)
        weight, bias = self.p.get("compress.weight"), self.p.get("compress.bias")
        own: dict[str, Any] = {}
        if weight is not None:
            own = {"weight": weight[None], "bias": bias[None]}  # type: ignore[index]
        if self.kind == "dilated_conv":
            own["dilation"] = self.settings["dilation"]
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


def run_op(case: Case) -> Got:
    layer = Layer(case)
    for index, length in enumerate(case.settings["segment_lengths"], 1):
        layer.step(index)
        assert layer.x[index].shape[1] == length
    layer.finish()
    return {**layer.got}


def check(case: Case) -> None:
    got = {"op": run_op, "model": run_model}[case.level](case)
    compare(case, got, TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", names_of("compressive"))
def test_case(name: str, dtype: torch.dtype) -> None:
    check(read_case("compressive", name, dtype))
