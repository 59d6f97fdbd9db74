"""Compaction of one head after the other in float64: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops.compaction.matching import KeyValueBlock, Matching
from memwrap.ops.compaction.pursuit import pursue
from memwrap.ops.compaction.solvers import SMALLEST, clamped_least_squares, shortest

Slots = tuple[list[int], Tensor, Tensor]  # keys, biases `(S,)`, values `(S, Dv)`


def head_of(flat: KeyValueBlock, row: int) -> KeyValueBlock:
    """Take one head of a flat block: its queries and keys that are there, in float64."""
    present, asked = flat.valid[row], flat.weight[row] > 0  # type: ignore[index]
    query, weight = flat.query[row][asked], flat.weight[row][asked]  # type: ignore[index]
    parts = (flat.key[row], flat.value[row], flat.bias[row])  # type: ignore[index]
    key, value, bias = (x[present].double() for x in parts)
    return KeyValueBlock(
        query.double(), key, value, flat.scaling, bias, None, weight.double(), flat.softcap
    )


def scores_naive(head: KeyValueBlock, matching: Matching) -> Tensor:
    """Score the keys `(T,)` of one head."""
    logits = head.logits(head.query, head.key, head.bias)  # type: ignore[arg-type]
    attention = torch.softmax(logits, -1) * head.weight[:, None]  # type: ignore[index]
    if matching.score == "rms":
        score = attention.square().mean(0).sqrt()
    else:
        score = attention.amax(0) if matching.score == "max" else attention.mean(0)
    if matching.pooling is None:
        return score
    half = matching.pooling_width // 2
    padded = [0.0] * half + score.tolist() + [0.0] * half
    windows = [padded[i : i + matching.pooling_width] for i in range(len(score))]
    if matching.pooling == "max":
        return score.new_tensor([max(w) for w in windows])
    return score.new_tensor([sum(w) / matching.pooling_width for w in windows])


def compact_naive(
    head: KeyValueBlock, count: int, matching: Matching, start: Tensor | None
) -> Slots:
    """Compact one head to `count` slots."""
    if matching.keep_all and len(head.key) <= count:
        return list(range(len(head.key))), head.bias, head.value  # type: ignore[return-value]
    if matching.selection == "attention":
        score = scores_naive(head, matching)
        index = score.argsort(descending=True, stable=True)[:count].tolist()
        return fit_naive(head, index, matching, start)
    rows, target = mass_naive(head, matching)
    lengths = rows.norm(dim=0) + 1e-12 if matching.normalized else 1.0

    def correlate(chosen: list[int], weights: Tensor) -> Tensor:
        return rows.T @ (target - rows[:, chosen] @ weights.double()) / lengths

    def solve(chosen: list[int]) -> Tensor:
        return weights_naive(rows[:, chosen], target, matching, start)

    present = torch.ones(len(head.key), dtype=torch.bool)
    index, weights = pursue(matching, count, present, correlate, solve)
    return fit_naive(head, index, matching, start, weights)


def mass_naive(head: KeyValueBlock, matching: Matching) -> tuple[Tensor, Tensor]:
    """Give every key's exponentials `(N, T)` and their sums `(N,)`, as queries count them."""
    logits = head.logits(head.query, head.key, head.bias)  # type: ignore[arg-type]
    rows = (logits - logits.amax(-1, keepdim=True)).exp()
    if matching.relative:
        rows = rows / rows.sum(-1, keepdim=True)
    rows = rows * head.weight[:, None]  # type: ignore[index]
    return rows, rows.sum(-1)


def weights_naive(rows: Tensor, target: Tensor, matching: Matching, start: Tensor | None) -> Tensor:
    """Fit the weights of chosen keys, `rows` `(N, t)`, to the mass."""
    lower, upper = max(matching.lower, SMALLEST), matching.upper
    if matching.steps is not None or not rows.shape[1]:
        steps = matching.steps or 0
        return clamped_least_squares(rows, target, lower, upper, steps, start)
    gram, right = rows.T @ rows, rows.T @ target
    ridge = ridge_naive(gram, matching)
    common = min(max(float(right.sum() / gram.sum()), lower), upper)
    gram, right = gram + ridge * torch.eye(len(gram), dtype=gram.dtype), right + ridge * common
    x = torch.full_like(right, common)
    for _ in range(2000):  # one variable after the other, until nothing moves
        before = x.clone()
        for j in range(len(x)):
            x[j] = (x[j] - (gram[j] @ x - right[j]) / gram[j, j]).clamp(lower, upper)
        if float((x - before).abs().max()) < 1e-13:
            break
    return x


def ridge_naive(gram: Tensor, matching: Matching) -> float:
    """Compute the ridge of a Gram matrix."""
    unit = {"mean": float(gram.trace()) / len(gram), "one": 1.0}
    if matching.ridge_of == "largest":
        return matching.ridge * float(torch.linalg.eigvalsh(gram)[-1])
    return matching.ridge * unit[matching.ridge_of]


def fit_naive(
    head: KeyValueBlock,
    index: list[int],
    matching: Matching,
    start: Tensor | None,
    weights: Tensor | None = None,
) -> Slots:
    """Fit biases (unless `weights` are given) and values of chosen keys."""
    rows, target = mass_naive(head, matching)
    key, old, bias = head.key[index], head.value[index], head.bias[index]  # type: ignore[index]
    if not index:
        return index, bias, old
    if matching.fit_bias:
        if weights is None:
            weights = weights_naive(rows[:, index], target, matching, start)
        bias = bias + weights.double().log()
    if not matching.fit_values:
        return index, bias, old
    logits = head.logits(head.query, head.key, head.bias)  # type: ignore[arg-type]
    output = torch.softmax(logits, -1) @ head.value
    weight = head.weight[:, None]  # type: ignore[index]
    x = torch.softmax(head.logits(head.query, key, bias), -1) * weight
    past = old if matching.towards_old else torch.zeros_like(old)
    missing = output * weight - x @ past
    if matching.ridge == 0:
        return index, bias, past + shortest(x, missing)
    gram = x.T @ x
    ridge = ridge_naive(gram, matching) * torch.eye(len(gram), dtype=gram.dtype)
    return index, bias, past + torch.linalg.solve(gram + ridge, x.T @ missing)
