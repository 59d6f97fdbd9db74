"""Checks and the choice of an implementation; formulas and shapes in `memwrap.ops.compaction`."""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.ops import accumulation_dtype, current_backend
from memwrap.ops.compaction.chunked import compact_chunked, fit_chunked, survey
from memwrap.ops.compaction.matching import Compacted, KeyValueBlock, Matching
from memwrap.ops.compaction.naive import compact_naive, fit_naive, head_of, scores_naive


def stack_groups(query: Tensor, heads: int) -> Tensor:
    """Stack the queries `(B, H, n, D)` of the query heads that share one of `heads` KV heads:
    `(B, Hkv, G * n, D)`."""
    return query.unflatten(1, (heads, -1)).flatten(2, 3)


def key_scores(block: KeyValueBlock, matching: Matching) -> Tensor:
    """Score keys by the attention that the queries give them.

    Returns:
        `(B, Hkv, T)`; -1 for a key that is not there.
    """
    flat = _ready(block)
    if current_backend() == "naive":
        score = flat.key.new_full(flat.key.shape[:2], -1.0)
        for row, valid in enumerate(flat.valid):  # type: ignore[arg-type]
            score[row, valid] = scores_naive(head_of(flat, row), matching).to(score)
    else:
        score = survey(flat, matching).score
    return score.view(block.key.shape[:3])


@torch.no_grad()
def compact(
    block: KeyValueBlock, slots: int | Tensor, matching: Matching, start: Tensor | None = None
) -> Compacted:
    """Compact keys and values to slots that act like all of them on the block's queries.

    Args:
        block: keys, values, queries.
        slots: of a head; or of each, `(Hkv,)` or `(B, Hkv)`.
        matching: how.
        start: `(B, Hkv, S)` of the power iteration in published projected gradient; None: none.

    Returns:
        The slots, with biases and values in float64 (float32 where a device has none). Where fewer
        keys are there than slots, the others are not filled.

    Raises:
        ValueError: for negative slots.
    """
    batch, heads = block.key.shape[:2]
    wanted = torch.as_tensor(slots, device=block.key.device).expand(batch, heads).flatten()
    if bool((wanted < 0).any()):
        raise ValueError(f"`slots` is {slots}; a head needs 0 or more.")
    flat = _ready(block)
    begin = None if start is None else start.flatten(0, 1)
    if current_backend() == "naive":
        parts = _one_by_one(flat, wanted, matching, begin)
    else:
        parts = compact_chunked(flat, wanted, matching, begin)
    return Compacted(*(x.unflatten(0, (batch, heads)) for x in parts))


@torch.no_grad()
def fit(block: KeyValueBlock, index: Tensor, filled: Tensor, matching: Matching) -> Compacted:
    """Fit biases and values of keys that are chosen: `index` and `filled`, each `(B, Hkv, S)`."""
    flat, flat_index, flat_filled = _ready(block), index.flatten(0, 1), filled.flatten(0, 1)
    if current_backend() == "naive":
        shape = flat_index.shape
        bias = torch.zeros(shape, dtype=torch.float64)
        value = torch.zeros(*shape, flat.value.shape[-1], dtype=torch.float64)
        for row, mask in enumerate(flat_filled):
            head = head_of(flat, row)
            _, bias[row, mask], value[row, mask] = fit_naive(
                head, flat_index[row, mask].tolist(), matching, None
            )
    else:
        measures = survey(flat, matching)
        bias, value = fit_chunked(flat, measures, flat_index, flat_filled, matching, None)
        bias, value = bias * flat_filled, value * flat_filled[..., None]
    return Compacted(index, filled, bias.view(index.shape), value.view(*index.shape, -1))


def _ready(block: KeyValueBlock) -> KeyValueBlock:
    """Bring a block to one dtype that is wide enough, with rows and heads in one dimension."""
    flat = block.flat()
    dtype = accumulation_dtype(flat.key)
    tensors = (flat.query, flat.key, flat.value, flat.bias, flat.weight)
    query, key, value, bias, weight = (x.detach().to(dtype) for x in tensors)  # type: ignore[union-attr]
    return KeyValueBlock(query, key, value, flat.scaling, bias, flat.valid, weight, flat.softcap)


def _one_by_one(
    flat: KeyValueBlock, slots: Tensor, matching: Matching, start: Tensor | None
) -> tuple[Tensor, ...]:
    """Compact the heads one after the other by the naive implementation."""
    most = min(int(slots.max()), flat.key.shape[1])
    shape = len(slots), most
    index = torch.zeros(shape, dtype=torch.long)
    filled = torch.zeros(shape, dtype=torch.bool)
    bias = torch.zeros(shape, dtype=torch.float64)
    value = torch.zeros(*shape, flat.value.shape[-1], dtype=torch.float64)
    for row, valid in enumerate(flat.valid):  # type: ignore[arg-type]
        head, count = head_of(flat, row), min(int(slots[row]), int(valid.sum()))
        begin = None if start is None else start[row, :count].double()
        keys, own_bias, own_value = compact_naive(head, count, matching, begin)
        places = valid.nonzero()[:, 0]
        index[row, : len(keys)] = places[keys]
        filled[row, : len(keys)] = True
        bias[row, : len(keys)], value[row, : len(keys)] = own_bias, own_value
    device = flat.key.device
    return tuple(x.to(device) for x in (index, filled, bias, value))
