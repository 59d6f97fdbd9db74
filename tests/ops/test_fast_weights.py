"""Fast weights: naive and fast agree, gradients are right, padding writes nothing, edges hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memwrap.ops import backend, fast_weights
from memwrap.ops.fast_weights import (
    NETWORKS,
    STEPS,
    FastMemory,
    StepRule,
    WriteGates,
    gate_sums,
    orthogonalized,
    shapes,
)

BATCH, COUNT, TOKENS, WIDTH, INNER = 2, 2, 5, 4, 3
RULES = [
    StepRule(network=network, step=step, row_norm=norm)  # type: ignore[arg-type]
    for network in NETWORKS
    for step in STEPS
    for norm in (("post",) if step == "titans" else ("post", "pre"))
]


def of_rule(rule: StepRule) -> str:
    return f"{rule.network}-{rule.step}-{rule.row_norm}"


def drawn(rule: StepRule, momentum: bool = True, tokens: int = TOKENS) -> dict[str, Any]:
    """Inputs in float64: weights, momenta, sums, keys, values, queries and gates."""
    torch.manual_seed(0)
    make: dict[str, Any] = {"dtype": torch.float64}
    sizes = shapes(rule.network, WIDTH, WIDTH, INNER)
    first = tuple(torch.randn(COUNT, *size, **make) for size in sizes)

    def more() -> tuple[Tensor, ...]:
        return tuple(f + 0.3 * torch.randn(BATCH, COUNT, *f.shape[1:], **make) for f in first)

    rows = (BATCH, COUNT, tokens)
    memory = FastMemory(more(), more() if momentum else None, more() if rule.keeps_sum else None)
    gates = WriteGates(
        0.3 * torch.rand(*rows, len(sizes), **make),
        torch.rand(rows, **make) if momentum else None,
        0.5 * torch.rand(rows, **make),
    )
    key, value = torch.randn(*rows, WIDTH, **make), torch.randn(*rows, WIDTH, **make)
    return {"memory": memory, "key": key, "value": value, "gates": gates, "first": first}


def leaves_of(memory: FastMemory) -> list[Tensor]:
    return [*memory.weights, *(memory.momentum or ()), *(memory.total or ())]


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=of_rule)
def test_naive_and_fast_agree(rule: StepRule, momentum: bool) -> None:
    """Writes with padding, and reads by two query heads of every network."""
    inputs = drawn(rule, momentum)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[0, :2], mask[1, 3:] = False, False
    query = torch.randn(BATCH, 2 * COUNT, 3, WIDTH, dtype=torch.float64)
    results = []
    for name in ("naive", "torch"):
        with backend(name):
            memory = fast_weights.write(rule, **inputs, mask=mask)
            read = fast_weights.read(rule.network, memory.weights, query)
        results.append([*leaves_of(memory), read])
    assert len(results[0]) == len(results[1])
    for naive, fast in zip(*results, strict=True):
        # Muon: rounding in small directions times up to 490, several hundred operations deep.
        assert torch.allclose(naive, fast, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES, ids=of_rule)
def test_gradients(rule: StepRule) -> None:
    """Through a step and the read behind it, by finite differences in float64."""
    inputs = drawn(rule, tokens=3)
    gates, memory = inputs["gates"], inputs["memory"]
    query = torch.randn(BATCH, COUNT, 2, WIDTH, dtype=torch.float64)
    flat = [
        inputs["key"], inputs["value"], gates.rates, gates.momentum, gates.decay, query,
        *memory.weights, *memory.momentum, *inputs["first"],
    ]  # fmt: skip
    flat = [x.detach().requires_grad_() for x in flat]
    parts = len(memory.weights)

    def run(key: Tensor, value: Tensor, rates: Tensor, eta: Tensor, alpha: Tensor, query: Tensor,
            *rest: Tensor) -> Tensor:  # fmt: skip
        before = FastMemory(rest[:parts], rest[parts : 2 * parts], memory.total)
        first = rest[2 * parts :]
        new = fast_weights.write(rule, before, key, value, WriteGates(rates, eta, alpha), first)
        return fast_weights.read(rule.network, new.weights, query)

    assert torch.autograd.gradcheck(run, flat, fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=of_rule)
def test_padding_is_as_if_it_were_not_there(rule: StepRule) -> None:
    inputs = drawn(rule)
    alone = fast_weights.write(rule, **inputs)

    def wider(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        more = torch.full_like(x, 0.7)
        return torch.cat([more[:, :, :2], x, more[:, :, :1]], 2)

    gates = inputs["gates"]
    inputs["gates"] = WriteGates(wider(gates.rates), wider(gates.momentum), wider(gates.decay))  # type: ignore[arg-type]
    inputs |= {"key": wider(inputs["key"]), "value": wider(inputs["value"])}
    mask = torch.zeros(BATCH, TOKENS + 3, dtype=torch.bool)
    mask[:, 2:-1] = True
    beside = fast_weights.write(rule, **inputs, mask=mask)
    for got, want in zip(leaves_of(beside), leaves_of(alone), strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)


def test_rows_keep_their_norms() -> None:
    rule = StepRule(step="muon")
    inputs = drawn(rule)
    new = fast_weights.write(rule, **inputs)
    for w, first in zip(new.weights, inputs["first"], strict=True):
        assert torch.allclose(w.norm(dim=-1), first.norm(dim=-1).expand(BATCH, -1, -1), rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_muon_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(2, *shape, dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert bool((values > 0.6).all() and (values < 1.3).all())
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose((left.mT @ orthogonalized(matrix) @ right.mT).tril(-1),
                          torch.zeros(()).double(), atol=1e-9)  # fmt: skip
    assert not bool(orthogonalized(torch.zeros(2, 3, 4)).any())


@pytest.mark.parametrize("momentum", [True, False])
def test_gates_that_are_shut_and_long_segments(momentum: bool) -> None:
    """Momentum of 0 and decay of 1 are no NaN, over more tokens than a product of them survives."""
    tokens = 3000
    eta = torch.rand(1, 1, tokens)
    alpha = torch.rand(1, 1, tokens)
    eta[..., 5], alpha[..., 7] = 0.0, 1.0
    eta.requires_grad_()
    alpha.requires_grad_()
    sums = gate_sums(eta if momentum else None, alpha)
    sum(s.sum() for s in sums).backward()  # type: ignore[union-attr]
    assert all(bool(s.isfinite().all()) for s in sums)
    assert bool(alpha.grad.isfinite().all())  # type: ignore[union-attr]
    assert not momentum or bool(eta.grad.isfinite().all())  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused() -> None:
    rule = StepRule(step="titans")
    inputs = drawn(rule)
    with pytest.raises(ValueError, match="decay is None"):
        fast_weights.write(rule, **{**inputs, "gates": WriteGates(inputs["gates"].rates)})
    with pytest.raises(ValueError, match=r"keys are \(2, 2, 5, 3\)"):
        fast_weights.write(rule, **{**inputs, "key": inputs["key"][..., :3]})
    with pytest.raises(ValueError, match="Unknown network 'deep'"):
        fast_weights.read("deep", inputs["memory"].weights, inputs["key"])
    with pytest.raises(ValueError, match="adds its input, 4 wide, to its output, 5 wide"):
        shapes("mlp", 4, 5, 3)
