"""Conformance of Infini-attention's memory: every op case in the folder, through the ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, compare, names_of, read_case
from torch import Tensor

from memwrap.ops import backend, infini

TOLERANCES = {"float64": 1e-9, "float32": 5e-5}
STATES = {"float64": 1e-9, "float32": 1e-3}  # conformance's own: sums of a whole segment
INPUTS = ("q", "k", "v", "beta")
COMMON = (
    "batch", "heads", "kv_heads", "d_key", "d_value", "segment_lengths", "update",
    "first_segment", "rope", "rope_theta", "detach_every", "has_token_mask", "has_initial_state",
    "eps",
)  # fmt: skip


def op_cases() -> list[str]:
    """The cases of single ops; those of whole models have a runner of their own."""
    return [n for n in names_of("infini") if not n.startswith("model_")]


def rotated(x: Tensor, theta: float) -> Tensor:
    """RoPE over half-split channels, positions from 0."""
    half = x.shape[-1] // 2
    frequency = theta ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency)
    cos, sin = (torch.cat([f, f], -1).to(x.dtype) for f in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def local(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention inside one segment; rows without a key give 0."""
    if case.settings["rope"]:
        q, k = (rotated(x, case.settings["rope_theta"]) for x in (q, k))
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, :]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = F.softmax(scores.masked_fill(~seen, torch.finfo(q.dtype).min), dim=-1).masked_fill(
        ~seen, 0.0
    )
    return weights @ v


def run_op(case: Case) -> dict[str, Tensor]:
    """Read, mix with local attention and write, segment by segment; gradients of the loss."""
    case.known(*COMMON)
    settings, t = case.settings, case.tensors
    assert settings["eps"] == 0.0 and not settings["has_initial_state"]
    assert settings["first_segment"] in ("local_only", "zero_gated")
    assert settings["has_token_mask"] == ("token_mask" in t)
    leaves = {n: t[n].clone().requires_grad_() for n in INPUTS}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    gate = torch.sigmoid(leaves["beta"]).view(1, -1, 1, 1)
    mask = t["token_mask"].bool() if "token_mask" in t else None
    M = q.new_zeros(settings["batch"], settings["kv_heads"], settings["d_key"], settings["d_value"])
    z = M[..., 0]
    results, outs, start = {}, [], 0
    for s, length in enumerate(settings["segment_lengths"]):
        part = slice(start, start + length)
        start += length
        own_mask = None if mask is None else mask[:, part]
        empty = (z == 0).all(-1).all(-1).view(-1, 1, 1, 1)
        read = infini.read(q[:, :, part], M, z)
        near = local(case, q[:, :, part], k[:, :, part], v[:, :, part], own_mask)
        mixed = gate * read + (1 - gate) * near
        if settings["first_segment"] == "local_only":
            mixed = torch.where(empty, near, mixed)
        outs.append(mixed)
        results |= {f"A_mem_{s + 1}": read, f"A_dot_{s + 1}": near}
        M, z = infini.write(
            k[:, :, part], v[:, :, part], M, z, update=settings["update"], mask=own_mask
        )
        results |= {f"M_{s + 1}": M, f"z_{s + 1}": z}
        if settings["detach_every"] and (s + 1) % settings["detach_every"] == 0:
            M, z = M.detach(), z.detach()
    results["out"] = torch.cat(outs, dim=2)
    results["loss"] = (results["out"] * t["loss_weight"]).sum()
    results["loss"].backward()
    return results | {f"grad_{n}": x.grad for n, x in leaves.items()}  # type: ignore[misc]


def by_reference_name(case: Case, results: dict[str, Tensor]) -> tuple[Case, dict[str, Tensor]]:
    """These cases name their outputs without `out.` and `grad.`: told apart from the inputs."""
    given = {*INPUTS, "loss_weight", "token_mask"}
    tensors = {n if n in given else f"out.{n}": x for n, x in case.tensors.items()}
    renamed = Case(case.method, case.name, case.about, tensors)
    return renamed, {f"out.{n}": x for n, x in results.items()}


def run(case: Case) -> dict[str, Tensor]:
    if case.about["level"] == "op" and {"out", "loss", "grad_q"} <= case.tensors.keys():
        return run_op(case)
    pytest.fail(f"{case.name}: not understood; it holds {sorted(case.tensors)}")


@pytest.mark.parametrize("ops", ["torch", "naive"])
@pytest.mark.parametrize("name", op_cases())
def test_infini(name: str, ops: str) -> None:
    case = read_case("infini", name)
    with backend(ops):
        case, results = by_reference_name(case, run(case))
    kind = case.about["dtype"]
    tolerances = {"out.": TOLERANCES[kind], "out.M_": STATES[kind], "out.z_": STATES[kind]}
    compare(case, results, tolerances)


@pytest.mark.parametrize("update", infini.UPDATES)
def test_a_scan_is_its_segments(update: str) -> None:
    """The same reference states when the whole sequence is handed over at once."""
    names = [n for n in op_cases() if n.startswith(f"op_{update}")]
    assert names
    for name in names:
        case = read_case("infini", name)
        t, lengths = case.tensors, case.settings["segment_lengths"]
        mask = t["token_mask"].bool() if "token_mask" in t else None
        M = torch.zeros_like(t["M_1"])
        out, M, z = infini.scan(
            t["q"], t["k"], t["v"], M, M[..., 0], lengths[0], update=update, mask=mask
        )
        last, start = len(lengths), sum(lengths[:-1])
        found: dict[str, Any] = {
            f"M_{last}": M, f"z_{last}": z, f"A_mem_{last}": out[:, :, start:],
        }  # fmt: skip
        for key, value in found.items():
            scale = float(t[key].abs().max())
            assert float((value - t[key]).abs().max()) <= STATES[case.about["dtype"]] * scale, key


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("infini", "strange", about, {"out.x": torch.ones(1)}))
