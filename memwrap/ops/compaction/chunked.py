"""Compaction of all heads at once: queries go by in chunks, and only sums over them are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from memwrap.ops.buffers import filled as first_slots
from memwrap.ops.compaction.matching import KeyValueBlock, Matching
from memwrap.ops.compaction.pursuit import pursue
from memwrap.ops.compaction.solvers import (
    SMALLEST,
    bounded_least_squares,
    clamped_least_squares,
    ridge_of,
    ridge_solve,
    shortest,
)

CHUNK = 2**22  # scores that are alive at one time


@dataclass(frozen=True)
class Survey:
    """The findings of a first pass over the queries.

    Attributes:
        score: `(R, T)` of the keys, -1 for one that is not there.
        high: `(R, N)` largest logit of each query; mass: `(R, N)` sum of exponentials over it.
        output: `(R, N, Dv)`.
        gram: `(R, T, T)` of the keys' exponentials, for the pursuit.
    """

    score: Tensor
    high: Tensor
    mass: Tensor
    output: Tensor
    gram: Tensor | None


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Choose the dtype of Gram matrices: squares lose half of the digits."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def chunks(flat: KeyValueBlock, keys: int) -> Iterator[slice]:
    """Cut the queries so that scores for `keys` keys stay small."""
    length = max(1, CHUNK // max(1, len(flat.query) * keys))
    for start in range(0, flat.query.shape[1], length):
        yield slice(start, start + length)


def survey(flat: KeyValueBlock, matching: Matching) -> Survey:
    """Run all queries against all keys."""
    weight: Tensor = flat.weight  # type: ignore[assignment]
    valid: Tensor = flat.valid  # type: ignore[assignment]
    total = flat.key.new_zeros(valid.shape)
    gram: Tensor | None = None
    if matching.selection == "omp":
        size = valid.shape[1]
        gram = torch.zeros(len(valid), size, size, dtype=wide_dtype(total), device=total.device)
    pieces = []
    for part in chunks(flat, valid.shape[1]):
        logits = flat.logits(flat.query[:, part], flat.key, flat.bias)  # type: ignore[arg-type]
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
        high = logits.amax(-1).clamp_min(torch.finfo(logits.dtype).min)  # a row without keys
        exponentials = (logits - high[..., None]).exp()
        mass = exponentials.sum(-1).clamp_min(torch.finfo(logits.dtype).tiny)
        attention = exponentials / mass[..., None]
        pieces.append((high, mass, attention @ flat.value))
        counted = attention * weight[:, part, None]
        if matching.score == "max":
            total = torch.maximum(total, counted.amax(1))
        else:
            total = total + (counted.square() if matching.score == "rms" else counted).sum(1)
        if gram is not None:
            unit = attention if matching.relative else exponentials
            rows = (unit * weight[:, part, None]).to(gram.dtype)
            gram = gram + rows.transpose(1, 2) @ rows
    high, mass, output = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    asked = (weight > 0).sum(1, keepdim=True).clamp_min(1)
    score = total if matching.score == "max" else total / asked
    score = pooled(score.sqrt() if matching.score == "rms" else score, valid, matching)
    return Survey(score.masked_fill(~valid, -1.0), high, mass, output, gram)


def pooled(score: Tensor, valid: Tensor, matching: Matching) -> Tensor:
    """Smooth scores `(R, T)` over neighbouring keys, of those that are `valid` `(R, T)`."""
    if matching.pooling is None:
        return score
    order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    near = (score * valid).gather(1, order)[:, None]
    pool = avg_pool1d if matching.pooling == "mean" else max_pool1d
    width = matching.pooling_width
    smooth = pool(near, width, stride=1, padding=width // 2)[:, 0]
    return torch.zeros_like(score).scatter(1, order, smooth)


def compact_chunked(
    flat: KeyValueBlock, slots: Tensor, matching: Matching, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compact flat heads: keys, which slots are filled, biases, and values."""
    valid: Tensor = flat.valid  # type: ignore[assignment]
    lengths = valid.sum(1)
    measures = survey(flat, matching)
    most = min(int(slots.max()), valid.shape[1])
    if matching.selection == "omp":
        index, filled, weights = _pursued(flat, measures, slots, most, matching, start)
    else:
        index = measures.score.argsort(dim=1, descending=True, stable=True)[:, :most]
        filled, weights = first_slots(torch.minimum(slots, lengths), most), None
    keeps = (lengths <= slots) if matching.keep_all else torch.zeros_like(lengths, dtype=torch.bool)
    first = (~valid).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    index = torch.where(keeps[:, None], first, index)
    filled = torch.where(keeps[:, None], first_slots(lengths, most), filled)
    index = index.masked_fill(~filled, 0)
    if bool(keeps.all()):
        bias, value = _old(flat, index)
    else:
        bias, value = fit_chunked(flat, measures, index, filled, matching, start, weights)
        old_bias, old = _old(flat, index)
        bias = torch.where(keeps[:, None], old_bias.to(bias), bias)
        value = torch.where(keeps[:, None, None], old.to(value), value)
    return index, filled, bias * filled, value * filled[..., None]


def fit_chunked(
    flat: KeyValueBlock,
    measures: Survey,
    index: Tensor,
    filled: Tensor,
    matching: Matching,
    start: Tensor | None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit biases `(R, S)` (unless `weights` `(R, S)` are given) and values `(R, S, Dv)` of the keys
    `index` `(R, S)`."""
    bias, old = _old(flat, index)
    wide = wide_dtype(bias)
    bias, old = bias.to(wide), old.to(wide)
    if matching.fit_bias:
        if weights is None:
            weights = _weights(flat, measures, index, filled, matching, start)
        bias = torch.where(filled, bias + weights.to(wide).clamp_min(SMALLEST).log(), 0.0)
    if not matching.fit_values:
        return bias, old
    past = old if matching.towards_old else torch.zeros_like(old)
    if matching.ridge == 0:
        missing = measures.output.to(wide) * flat.weight[..., None]  # type: ignore[index]
        value = past.clone()
        for row in range(len(index)):
            mask = filled[row]
            x = torch.cat([x[row] for x, _ in _shares(flat, index, filled, bias)])[:, mask].to(wide)
            value[row, mask] += shortest(x, missing[row] - x @ past[row, mask])
        return bias, value
    size = index.shape[1]
    gram = torch.zeros(len(index), size, size, dtype=wide, device=bias.device)
    right = torch.zeros_like(old)
    for x, part in _shares(flat, index, filled, bias):
        rows = x.to(wide).transpose(1, 2)
        gram += rows @ rows.transpose(1, 2)
        right += rows @ (measures.output[:, part] * flat.weight[:, part, None]).to(wide)  # type: ignore[index]
    ridge = ridge_of(gram, filled, matching).clamp_min(torch.finfo(wide).tiny)
    right = right - gram @ past
    gram = gram + torch.diag_embed((~filled).to(wide))
    return bias, past + ridge_solve(gram, right, ridge)


def _old(flat: KeyValueBlock, index: Tensor) -> tuple[Tensor, Tensor]:
    """Take biases and values of keys as they were."""
    value = flat.value.gather(1, index[..., None].expand(-1, -1, flat.value.shape[-1]))
    return flat.bias.gather(1, index), value  # type: ignore[union-attr]


def _key(flat: KeyValueBlock, index: Tensor) -> Tensor:
    return flat.key.gather(1, index[..., None].expand(-1, -1, flat.key.shape[-1]))


def _shares(
    flat: KeyValueBlock, index: Tensor, filled: Tensor, bias: Tensor
) -> Iterator[tuple[Tensor, slice]]:
    """Yield the softmax `(R, n, S)` of each chunk of queries over the slots, as queries count."""
    key, bias = _key(flat, index), bias.to(flat.key.dtype)
    for part in chunks(flat, index.shape[1]):
        logits = flat.logits(flat.query[:, part], key, bias)
        logits = logits.masked_fill(~filled[:, None], torch.finfo(logits.dtype).min)
        yield torch.softmax(logits, -1) * (filled[:, None] * flat.weight[:, part, None]), part  # type: ignore[index]


def _exponentials(
    flat: KeyValueBlock, measures: Survey, index: Tensor, filled: Tensor, relative: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each chunk of queries, the chosen keys' exponentials `(R, n, S)` and the mass
    `(R, n)`, as queries count them."""
    bias, key = _old(flat, index)[0], _key(flat, index)
    for part in chunks(flat, index.shape[1]):
        logits = flat.logits(flat.query[:, part], key, bias) - measures.high[:, part, None]
        mass, weight = measures.mass[:, part], flat.weight[:, part]  # type: ignore[index]
        rows = logits.exp() * filled[:, None]
        if relative:
            rows, mass = rows / mass[..., None], torch.ones_like(mass)
        yield rows * weight[..., None], mass * weight


def _weights(
    flat: KeyValueBlock,
    measures: Survey,
    index: Tensor,
    filled: Tensor,
    matching: Matching,
    start: Tensor | None,
) -> Tensor:
    """Fit weights `(R, S)` to the mass."""
    wide = wide_dtype(flat.key)
    lower, upper = max(matching.lower, SMALLEST), matching.upper
    parts = _exponentials(flat, measures, index, filled, matching.relative)
    if matching.steps is not None:
        rows, target = (torch.cat(x, 1).to(wide) for x in zip(*parts, strict=True))
        weights = torch.ones(index.shape, dtype=wide, device=rows.device)
        for row, mask in enumerate(filled):
            begin = None if start is None else start[row, : int(mask.sum())].to(wide)
            weights[row, mask] = clamped_least_squares(
                rows[row][:, mask], target[row], lower, upper, matching.steps, begin
            )
        return weights
    size = index.shape[1]
    gram = torch.zeros(len(index), size, size, dtype=wide, device=flat.key.device)
    right = torch.zeros(len(index), size, dtype=wide, device=flat.key.device)
    for rows, target in parts:
        turned = rows.to(wide).transpose(1, 2)
        gram += turned @ turned.transpose(1, 2)
        right += (turned @ target.to(wide)[..., None])[..., 0]
    return _bounded(gram, right, filled, matching, lower, upper)


def _bounded(
    gram: Tensor, right: Tensor, filled: Tensor, matching: Matching, lower: float, upper: float
) -> Tensor:
    """Solve for weights within bounds; the ridge pulls to the one weight that is best for all."""
    tiny = torch.finfo(gram.dtype).tiny
    ridge = ridge_of(gram, filled, matching).clamp_min(tiny)
    common = (right.sum(-1) / gram.sum((-2, -1)).clamp_min(tiny)).clamp(lower, upper)
    extra = torch.where(filled, ridge[:, None], 1.0)
    right = right + torch.where(filled, (ridge * common)[:, None], 0.0)
    return bounded_least_squares(gram + torch.diag_embed(extra), right, lower, upper)


def _pursued(
    flat: KeyValueBlock,
    measures: Survey,
    slots: Tensor,
    most: int,
    matching: Matching,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose keys by matching pursuit, head by head, on the Gram matrix of their exponentials."""
    gram: Tensor = measures.gram  # type: ignore[assignment]
    index = torch.zeros(len(slots), most, dtype=torch.long, device=slots.device)
    filled = torch.zeros_like(index, dtype=torch.bool)
    weights = torch.ones_like(index, dtype=gram.dtype)
    for row, valid in enumerate(flat.valid):  # type: ignore[arg-type]
        row_gram = gram[row]
        target = row_gram.sum(1)
        lengths = row_gram.diagonal().sqrt() + 1e-12 if matching.normalized else 1.0

        def correlate(
            chosen: list[int],
            x: Tensor,
            row_gram: Tensor = row_gram,
            target: Tensor = target,
            lengths: Tensor | float = lengths,
        ) -> Tensor:
            return (target - row_gram[:, chosen] @ x.to(row_gram)) / lengths

        def solve(
            chosen: list[int], row: int = row, row_gram: Tensor = row_gram, target: Tensor = target
        ) -> Tensor:
            keys = torch.tensor([chosen], dtype=torch.long, device=slots.device).view(1, -1)
            all_filled = torch.ones_like(keys, dtype=torch.bool)
            if matching.steps is None:
                lower = max(matching.lower, SMALLEST)
                parts = row_gram[chosen][None, :, chosen], target[chosen][None]
                return _bounded(*parts, all_filled, matching, lower, matching.upper)[0]
            begin = None if start is None else start[row : row + 1]
            alone, of = _one(flat, row), _measures_of(measures, row)
            return _weights(alone, of, keys, all_filled, matching, begin)[0]

        wanted = min(int(slots[row]), int(valid.sum()))
        chosen, x = pursue(matching, wanted, valid, correlate, solve)
        count = len(chosen)
        index[row, :count] = torch.tensor(chosen, dtype=torch.long, device=slots.device)
        filled[row, :count], weights[row, :count] = True, x
    return index, filled, weights


def _one(flat: KeyValueBlock, row: int) -> KeyValueBlock:
    parts = (flat.query, flat.key, flat.value)
    extra = (flat.bias, flat.valid, flat.weight)
    query, key, value = (x[row : row + 1] for x in parts)
    bias, valid, weight = (x[row : row + 1] for x in extra)  # type: ignore[index]
    return KeyValueBlock(query, key, value, flat.scaling, bias, valid, weight, flat.softcap)


def _measures_of(measures: Survey, row: int) -> Survey:
    score, high, mass = (x[row : row + 1] for x in (measures.score, measures.high, measures.mass))
    return Survey(score, high, mass, measures.output[row : row + 1], None)
