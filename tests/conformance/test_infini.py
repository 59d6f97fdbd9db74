"""Conformance of Infini-attention: every case, op and model."""

from __future__ import annotations

import pytest
import torch
from backbones import backbone_of, base_gradients, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from models import cuts_of, loss_per_segment, read, size_for
from one_layer import rotated_by_hand
from torch import Tensor

import memwrap
from memwrap.ops import backend, infini

OP = Tolerances(reference={"": 5e-6}, float32={"": 1e-5})
MODEL = Tolerances(reference={"": 2e-5, "grad.": 2e-5}, float32={"": 2e-5, "grad.": 2e-5})
INPUTS = ("q", "k", "v", "beta")


def local(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention inside one segment; rows without a key give 0."""
    if case.settings["rope"]:
        q, k = (rotated_by_hand(x, case.settings["rope_theta"]) for x in (q, k))
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    return scores.softmax(-1).masked_fill(~seen, 0.0) @ v


def check_settings(case: Case) -> None:
    """What the settings repeat of the tensors."""
    t = {n: case.tensors[n] for n in INPUTS}
    case.holds(
        batch=len(t["q"]), heads=t["q"].shape[1], kv_heads=t["k"].shape[1],
        d_key=t["q"].shape[3], d_value=t["v"].shape[3], eps=0.0,
        has_token_mask="token_mask" in case.tensors, has_initial_state="M_0" in case.tensors,
    )  # fmt: skip
    case.aside("rope_theta")  # where nothing is rotated
    assert case.settings["first_segment"] in ("local_only", "zero_gated")


def run_op(case: Case) -> Got:
    """Read, mix with local attention and write, segment by segment; gradients of the loss."""
    check_settings(case)
    settings, leaves = case.settings, case.leaves(*INPUTS)
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    gate = torch.sigmoid(leaves["beta"]).view(1, -1, 1, 1)
    mask = None if "token_mask" not in case.tensors else case.tensors["token_mask"].bool()
    M, z = first = state_of(case)
    results: dict[str, Tensor] = {}
    outs = []
    for s, part in enumerate(cuts_of(settings["segment_lengths"], q.shape[2]), 1):
        own_mask = None if mask is None else mask[:, part]
        empty = (z == 0).all(-1).all(-1).view(-1, 1, 1, 1)
        found = infini.read(q[:, :, part], M, z)
        near = local(case, q[:, :, part], k[:, :, part], v[:, :, part], own_mask)
        mixed = gate * found + (1 - gate) * near
        if settings["first_segment"] == "local_only":
            mixed = torch.where(empty, near, mixed)
        outs.append(mixed)
        M, z = infini.write(
            k[:, :, part], v[:, :, part], M, z, update=settings["update"], mask=own_mask
        )
        results |= {f"A_mem_{s}": found, f"A_dot_{s}": near, f"M_{s}": M, f"z_{s}": z}
        if settings["detach_every"] and s % settings["detach_every"] == 0:
            M, z = M.detach(), z.detach()
    results["out"] = torch.cat(outs, dim=2)
    results["loss"] = (results["out"] * case.tensors["loss_weight"]).sum()
    results["loss"].backward()
    results |= {f"grad_{n}": x.grad for n, x in leaves.items()}  # type: ignore[misc]
    return with_scan(case, results, mask, first)


def state_of(case: Case) -> tuple[Tensor, Tensor]:
    """The memory before the first segment."""
    if case.settings["has_initial_state"]:
        return case.tensors["M_0"], case.tensors["z_0"]
    k, v = case.tensors["k"], case.tensors["v"]
    M = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    return M, M[..., 0]


def with_scan(
    case: Case, results: dict[str, Tensor], mask: Tensor | None, state: tuple[Tensor, Tensor]
) -> Got:
    """The results, each beside what the whole sequence gives when it is handed over at once."""
    lengths = case.settings["segment_lengths"]
    if size_for(lengths) > max(lengths):
        return {**results}  # no scan cuts a sequence so
    both: Got = {**results}
    q, k, v = (case.tensors[n] for n in "qkv")
    out, M, z = infini.scan(q, k, v, *state, lengths[0], update=case.settings["update"], mask=mask)
    for s, part in enumerate(cuts_of(lengths, q.shape[2]), 1):
        both[f"A_mem_{s}"] = [results[f"A_mem_{s}"], out[:, :, part]]
    last = len(lengths)
    both |= {f"M_{last}": [results[f"M_{last}"], M], f"z_{last}": [results[f"z_{last}"], z]}
    return both


def run_model(case: Case) -> Got:
    ids, lengths = case.tensors["input_ids"], case.settings["segment_lengths"]
    case.holds(rope_positions="restart per segment")
    config = memwrap.InfiniConfig(
        segment_size=size_for(lengths),
        update=case.settings["update"],
        first_segment=case.settings["first_segment"],
    )
    model = memwrap.wrap(backbone_of(case, sizes_of(case.settings["base"])), config)
    gates = list(model.memories["infini"].gates.values())
    with torch.no_grad():
        for gate, beta in zip(gates, case.tensors["memory.beta"], strict=True):
            gate.copy_(beta)
    logits, loss, state = read(model, ids, lengths)
    loss.backward()
    got = {"logits": logits, "loss_next_token": loss}
    got["loss_per_segment"] = loss_per_segment(logits, ids, lengths)
    got["grad.memory.beta"] = torch.stack([gate.grad for gate in gates])
    for layer, tree in state.memories["infini"]["layers"].items():
        got |= {f"{n}_final.layer{layer}": tree[n] for n in ("M", "z")}
    return got | base_gradients(model, case)


def run(case: Case) -> Got:
    if case.level == "op" and "grad_q" in case.tensors:
        return run_op(case)
    if case.level == "model" and "memory.beta" in case.tensors:
        return run_model(case)
    return case.not_understood()


def check(case: Case, ops: str = "torch") -> None:
    with backend(ops):
        compare(case, run(case), OP if case.level == "op" else MODEL)


@both_precisions
@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", names_of("infini"))
def test_infini(name: str, ops: str, dtype: torch.dtype) -> None:
    check(read_case("infini", name, dtype), ops)
