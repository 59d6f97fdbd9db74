"""Slots of one layer: rows with a bias and a place for each KV head, and how rows are folded in.

A layer's tree holds `slot_key` `(B, Hkv, S, Dk)` (un-rotated), `slot_value` `(B, Hkv, S, Dv)`,
`slot_bias` and `slot_place` `(B, Hkv, S)` in float32, `slot_count` `(B, Hkv)`, how many of them are
filled from the left, and `limit` `(B,)`, how many slots a row may have on average over its heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention, MemoryKeyValues
from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.ops import compaction as ops
from memwrap.ops.buffers import filled
from memwrap.state.trees import Tree

NAMES = ("key", "value", "bias", "place")


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's past: un-rotated keys and values `(B, Hkv, N, D)`, biases, places and which
    of them are there, each `(B, Hkv, N)`. Places count from the open segment's first."""

    key: Tensor
    value: Tensor
    bias: Tensor
    place: Tensor
    valid: Tensor

    @classmethod
    def plain(cls, key: Tensor, value: Tensor, place: Tensor, valid: Tensor) -> Rows:
        """Make them of tokens at `place` `(B, N)`, those that are `valid` `(B, N)`."""
        shape = key.shape[:3]
        places = place[:, None].expand(shape).float()
        return cls(key, value, torch.zeros_like(places), places, valid[:, None].expand(shape))

    def beside(self, *rows: Rows) -> Rows:
        """Put rows behind these."""
        parts = (self, *rows)
        tensors = {
            name: torch.cat([getattr(p, name).to(getattr(self, name)) for p in parts], 2)
            for name in (*NAMES, "valid")
        }
        return Rows(**tensors)

    def gathered(self, index: Tensor, present: Tensor) -> Rows:
        """Take the rows `index` `(B, Hkv, M)`; zeros where they are not `present`."""
        parts: dict[str, Any] = {}
        for name in NAMES:
            x = getattr(self, name)
            wide = x.dim() == 4
            at = index[..., None].expand(*index.shape, x.shape[-1]) if wide else index
            parts[name] = x.gather(2, at) * (present[..., None] if wide else present)
        return Rows(**parts, valid=present)

    def packed(self, width: int) -> Rows:
        """Move the rows that are there to the left, and give all `width` places."""
        order = (~self.valid).to(torch.int8).argsort(dim=-1, stable=True)[..., :width]
        return self.gathered(order, self.valid.gather(2, order)).padded(width)

    def padded(self, width: int) -> Rows:
        """Add rows that are not there, up to `width`."""
        more = width - self.key.shape[2]
        if more <= 0:
            return self
        pad = torch.nn.functional.pad
        key, value = (pad(x, (0, 0, 0, more)) for x in (self.key, self.value))
        bias, place, valid = (pad(x, (0, more)) for x in (self.bias, self.place, self.valid))
        return Rows(key, value, bias, place, valid)


@dataclass(frozen=True)
class References:
    """The queries by which rows are judged.

    Attributes:
        query: `(B, H, R, Dk)`, un-rotated.
        place: `(B, R)`. weight: `(B, H, R)`, 0 for one that is not there.
    """

    query: Tensor
    place: Tensor
    weight: Tensor

    def asked_again(self, tokens: Tensor) -> References:
        """Move them behind a text of `tokens` `(B,)`, as if it came again: there, behind all rows,
        is where slots will be read. At their own places some stand in front of rows that they are
        to judge, and beside others that later queries never see so near."""
        return replace(self, place=self.place + tokens[:, None])


def empty_slots(
    batch: int, width: int, dims: AttentionSizes, dtype: torch.dtype, device: torch.device,
    limit: int,
) -> Tree:  # fmt: skip
    """Make the slots' part of a layer's tree, nothing filled."""
    shape = (batch, dims.num_kv_heads, width)
    make: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "slot_key": torch.zeros(*shape, dims.key_dim, **make),
        "slot_value": torch.zeros(*shape, dims.value_dim, **make),
        "slot_bias": torch.zeros(shape, device=device),
        "slot_place": torch.zeros(shape, device=device),
        "slot_count": torch.zeros(shape[:2], dtype=torch.long, device=device),
        "limit": torch.full((batch,), limit, dtype=torch.long, device=device),
    }


def slots_of(state: Tree) -> Rows:
    """Take the slots of a layer's tree as rows."""
    key, value, bias, place = (state[f"slot_{name}"] for name in NAMES)
    width = state["slot_key"].shape[2]
    valid = filled(state["slot_count"].flatten(), width).view(*state["slot_count"].shape, width)
    return Rows(key, value, bias, place, valid)


def with_slots(state: Tree, rows: Rows, moved: Tensor) -> Tree:
    """Put rows, packed, into a layer's tree; the places move back by `moved` `(B,)`."""
    place = (rows.place - moved[:, None, None]) * rows.valid
    return {
        **state,
        "slot_key": rows.key.to(state["slot_key"].dtype, copy=True),  # a rotation is kept by tensor
        "slot_value": rows.value.to(state["slot_value"].dtype),
        "slot_bias": rows.bias.float(),
        "slot_place": place.float(),
        "slot_count": rows.valid.sum(-1),
    }


def compacted(
    attention: LayerAttention,
    rows: Rows,
    budget: Tensor,
    references: References,
    matching: ops.Matching,
    farthest: int | None,
    softcap: float | None,
) -> Rows:
    """Compact rows to `budget` `(B, Hkv)` slots, as references see them; where they fit they stay.

    Gradients reach the rows that were chosen, not what was fitted.
    """
    width = int(budget.max())
    if bool((rows.valid.sum(-1) <= budget).all()):
        return rows.packed(width)
    heads, wide = rows.key.shape[1], torch.promote_types(rows.key.dtype, torch.float32)
    query = attention.rotate(references.query.to(wide), references.place)
    key = attention.rotate(rows.key.to(wide), clamped(rows.place, farthest))
    block = ops.KeyValueBlock(
        ops.stack_groups(query, heads), key, rows.value.to(wide), attention.scaling,
        rows.bias, rows.valid, ops.stack_groups(references.weight[..., None], heads)[..., 0],
        softcap,
    )  # fmt: skip
    slots = ops.compact(block, budget, matching).ordered()
    kept = rows.gathered(slots.index, slots.filled)
    fitted = kept.value + (slots.value.to(kept.value.dtype) - kept.value).detach()
    bias = slots.bias.to(kept.bias.dtype)
    return Rows(kept.key, fitted, bias, kept.place, slots.filled).padded(width)


def errors_of(
    attention: LayerAttention, rows: Rows, slots: Rows, sinks: Rows, references: References,
    farthest: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Compute what each KV head loses by slots in place of rows, `(Hkv,)`: the squared error of
    what references find, beside sinks that stay, in parts of all heads' squared output."""
    outputs = []
    for part in (rows, slots):
        share = share_of(attention, part, sinks, references, farthest, softcap)
        output = output_of(attention, part, references, farthest, softcap)
        outputs.append(share[..., None] * output)
    weight = references.weight[..., None]
    heads = rows.key.shape[1]
    lost = ((outputs[0] - outputs[1]).square() * weight).unflatten(1, (heads, -1))
    return lost.sum((0, 2, 3, 4)) / (outputs[0].square() * weight).sum().clamp_min(1e-30)


def output_of(
    attention: LayerAttention, rows: Rows, references: References, farthest: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """Compute what references find in rows alone, `(B, H, R, Dv)`."""
    heads, wide = rows.key.shape[1], torch.promote_types(rows.key.dtype, torch.float32)
    query = attention.rotate(references.query.to(wide), references.place)
    query = ops.stack_groups(query, heads)
    key = attention.rotate(rows.key.to(wide), clamped(rows.place, farthest))
    block = ops.KeyValueBlock(query, key, key, attention.scaling, softcap=softcap)
    logits = block.logits(query, key, rows.bias.to(wide))
    logits = logits.masked_fill(~rows.valid[:, :, None], torch.finfo(wide).min)
    output = torch.softmax(logits, -1) @ rows.value.to(wide)
    return output.view(*references.query.shape[:3], -1)


def share_of(
    attention: LayerAttention,
    folded: Rows,
    other_rows: Rows,
    references: References,
    farthest: int | None,
    softcap: float | None,
) -> Tensor:
    """Compute the share `(B, H, R)` of each reference query's attention that rows to be folded get,
    beside the `other_rows` that it sees."""
    heads, wide = folded.key.shape[1], torch.promote_types(folded.key.dtype, torch.float32)
    query = attention.rotate(references.query.to(wide), references.place)
    query = ops.stack_groups(query, heads)
    masses = []
    for rows in (folded, other_rows):
        key = attention.rotate(rows.key.to(wide), clamped(rows.place, farthest))
        block = ops.KeyValueBlock(query, key, key, attention.scaling, softcap=softcap)
        logits = block.logits(query, key, rows.bias.to(wide)).masked_fill(
            ~rows.valid[:, :, None], torch.finfo(wide).min
        )
        if rows is other_rows:
            place = references.place[:, None].expand(references.query.shape[:3])
            place = ops.stack_groups(place[..., None], heads)
            logits = logits.masked_fill(rows.place[:, :, None] > place, torch.finfo(wide).min)
        masses.append(logits.logsumexp(-1))
    return torch.sigmoid(masses[0] - masses[1]).view(references.query.shape[:3])


def clamped(place: Tensor, farthest: int | None) -> Tensor:
    """Bring places nearer that are farther than `farthest` before the segment."""
    return place if farthest is None else place.clamp_min(-farthest)


def key_values(state: Tree, farthest: int | None, uneven: bool) -> MemoryKeyValues:
    """Give the slots as attention reads them; `uneven`: heads have different numbers."""
    rows = slots_of(state)
    bias = rows.bias.masked_fill(~rows.valid, -torch.inf) if uneven else rows.bias
    return MemoryKeyValues(
        rows.key, rows.value, clamped(rows.place, farthest), rows.valid.any(1), static=True,
        bias=bias,
    )  # fmt: skip
