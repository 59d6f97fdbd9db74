"""Units of a store that groups of queries selected, each attended to by its group alone.

Shapes: B rows, H query heads, T queries in G groups of at most W, Hkv KV heads, U units that any
group selected, k units of a group, of b tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention
from memwrap.backbones.joining import cast, flashes
from memwrap.memories.parts.block_units import side_by_side, take_blocks
from memwrap.ops import flash
from memwrap.ops.buffers import take
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.ops.buffers.paged import Pages, SlotCache

GATHERED = 2  # a gathered key costs as much as so many scores
Units = tuple[Tensor, ...]


@dataclass(frozen=True)
class QueryGroups:
    """Queries that stand under one selection, side by side.

    Attributes:
        first, count: the selection of the first group, and G.
        width: W.
        places: `(B, T)`, where the queries stand in G groups of W; None: in their order.
    """

    first: int
    count: int
    width: int
    places: Tensor | None

    @classmethod
    def of(cls, index: Tensor) -> QueryGroups:
        """Group queries by their selections `(B, T)`, which do not decrease."""
        first, columns = int(index.min()), torch.arange(index.shape[1], device=index.device)
        count = int(index.max()) - first + 1
        begins = torch.nn.functional.pad(index[:, 1:] != index[:, :-1], (1, 0), value=True)
        slot = columns - torch.where(begins, columns, 0).cummax(1).values
        width = int(slot.max()) + 1
        places = (index - first) * width + slot
        in_order = count * width == index.shape[1] and bool((places == columns).all())
        return cls(first, count, width, None if in_order else places)

    def pays(self, units: int, most: int, length: int, heads: int) -> bool:
        """Tell whether it costs less that each group reads `most` units than that all queries,
        `length` of `heads` a KV head, read `units`."""
        grouped = self.count * most * (GATHERED + self.width * heads)
        return grouped < length * heads * units

    def spread(self, query: Tensor, heads: int) -> Tensor:
        """Lay `query` `(B, H, T, D)` out by group, `(B G, Hkv, H / Hkv * W, D)`."""
        if self.places is not None:
            room = query.new_zeros(*query.shape[:2], self.count * self.width, query.shape[3])
            index = self.places[:, None, :, None].expand_as(query)
            query = room.scatter(2, index, query)
        parted = query.unflatten(2, (self.count, self.width)).unflatten(1, (heads, -1))
        return parted.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)

    def gathered(self, x: Tensor, batch: int) -> Tensor:
        """Undo `spread`, of `(B G, Hkv, H / Hkv * W, D)`."""
        parted = x.unflatten(0, (batch, self.count)).unflatten(3, (-1, self.width))
        x = parted.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2, 3)
        return x if self.places is None else take(x, self.places)


@dataclass(frozen=True)
class GroupedUnits:
    """The units of each group of queries.

    Attributes:
        key, value: `(B, U, Hkv, b, D)`, those that any group selected.
        chosen: `(B, G, k)`, which of them; `taken`: `(B, G, k)` bool, whether one is.
        groups: of the queries.
    """

    key: Tensor
    value: Tensor
    chosen: Tensor
    taken: Tensor
    groups: QueryGroups

    def attend(self, attention: LayerAttention, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to them from `positions` `(B, T)`: the output `(B, H, T, D)` and the log of the
        sum `(B, H, T)`, -inf where nothing was selected."""
        batch, _, heads, block, width = self.key.shape
        turned = attention.turned(positions, "units")
        still = positions.new_zeros(1, block)
        key = attention.rotate(self.key.flatten(0, 1), still, ("unit", block))
        query, key, value = cast(turned, key, self.value.flatten(0, 1))
        rows = torch.arange(batch, device=positions.device)[:, None, None] * self.key.shape[1]
        by_head = torch.arange(heads, device=positions.device)[:, None]
        index = ((rows + self.chosen)[:, :, None] * heads + by_head).flatten()
        shape = batch * self.groups.count, heads, -1, width
        key, value = (
            x.reshape(-1, block * width).index_select(0, index).view(shape) for x in (key, value)
        )
        spread = self.groups.spread(query, heads)
        mask = nothing = None
        if not bool(self.taken.all()):
            nothing = ~self.taken.any(-1)
            seen = (self.taken | nothing[..., None]).flatten(0, 1)
            seen = seen.repeat_interleave(block, 1)[:, None, None]
            mask = torch.zeros(seen.shape, dtype=spread.dtype).masked_fill_(~seen, -torch.inf)
            mask = mask.expand(-1, 1, spread.shape[2], -1)
        out, log = flash.attended(spread, key, value, mask, attention.rotated_scaling)
        if nothing is not None:
            log = log.masked_fill(nothing.flatten()[:, None, None], -torch.inf)
        log = self.groups.gathered(log[..., None], batch).squeeze(-1)
        return self.groups.gathered(out, batch), log


def grouping(attention: LayerAttention, index: Tensor, name: object) -> QueryGroups | None:
    """Group queries by their selections `(B, T)`, the same in all layers; None where they cannot
    read their units apart: the kernel for it runs on the CPU, and has no gradient."""
    if torch.is_grad_enabled() or index.shape[1] == 1 or not flashes(attention):
        return None
    return attention.cached_per_step(("groups", name), lambda: QueryGroups.of(index))


def selected_units(
    pages: Pages, marks: Tensor, index: Tensor, groups: QueryGroups | None, heads: int,
    cache: SlotCache | None,
) -> Units | GroupedUnits:  # fmt: skip
    """Take the units that any of the queries selected.

    Args:
        pages: of the store.
        marks: `(B, S, N)` bool, the units of each selection.
        index: `(B, T)`, the selection under which each query stands.
        groups: of the queries, which may read their units apart.
        heads: H.
        cache: of units on the host.

    Returns:
        Keys and values `(B, Hkv, U b, D)`, and which query sees which token, `(B, T, U b)`; or, if
        it costs less, the units of the groups.
    """
    if groups is None:
        shown = marks.gather(1, index[..., None].expand(-1, -1, marks.shape[2]))
    else:
        shown = marks[:, groups.first : groups.first + groups.count]
    used = shown.any(1)
    most = int(used.sum(1).max()) if used.shape[1] else 0
    units = earliest(used, most)
    key, value = take_blocks(pages, units, cache)
    shown = shown.gather(2, units[:, None].expand(-1, shown.shape[1], -1))
    if groups is not None:
        count = shown.sum(2)
        each = int(count.max())
        if each and groups.pays(most, each, index.shape[1], heads // key.shape[2]):
            chosen = earliest(shown.flatten(0, 1), each).unflatten(0, shown.shape[:2])
            taken = torch.arange(each, device=count.device) < count[..., None]
            return GroupedUnits(key, value, chosen, taken, groups)
        number = (index - groups.first)[..., None].expand(-1, -1, most)
        shown = shown.gather(1, number)
    block = key.shape[3]
    return side_by_side(key), side_by_side(value), shown.repeat_interleave(block, 2)
