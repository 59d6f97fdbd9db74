"""Units of tokens in a store: those that queries selected are taken from its pages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from memwrap.ops import infllm as ops
from memwrap.ops.buffers.host_prefetch import prefetch
from memwrap.ops.buffers.kept import kept_beside
from memwrap.ops.buffers.left_aligned import earliest
from memwrap.ops.buffers.paged import SlotCache, take
from memwrap.state.trees import STORE, Tree

HELD = ("key", "value")
Units = tuple[Tensor, ...]
UNITS_A_PAGE = 16


class ReadsUnits:
    """The part of a memory that lays out the units which queries selected.

    Attributes:
        block_size: tokens of a unit.
        where: name of the store's subtree.
        slots: units that stay on the device, by layer, where the store is the host's.
    """

    block_size: int
    where: str
    slots: dict[int, SlotCache]

    def _behind_units(self, units: Units, sinks: Units) -> Units:
        """Put the sinks behind units; kept for as long as the same stand there."""

        def joined() -> tuple[Tensor, ...]:
            pairs = zip(units[:2], sinks[:2], strict=True)
            return *(torch.cat(pair, 2) for pair in pairs), sinks[0]

        key, value, before = kept_beside(units[0], "sinks", joined)
        if before is not sinks[0]:
            key, value, _ = joined()
        return key, value, torch.cat([units[2], sinks[2]], 2)

    def _fetched(
        self, layer: int, state: Tree, selection: ops.Selection | None, parts: list[slice]
    ) -> Iterable[Units | None]:
        """Yield the units that each part of the queries sees; from the host one part ahead."""
        if selection is None:
            return [None] * len(parts)
        fetches = [partial(self._units, layer, state, selection, piece) for piece in parts]
        if layer in self.slots and not torch.is_grad_enabled():
            return prefetch(fetches, selection.index.device)
        return (fetch() for fetch in fetches)

    def _units(self, layer: int, state: Tree, selection: ops.Selection, columns: slice) -> Units:
        """Take keys and values `(B, Hkv, U b, D)` of the units that any of the queries selected,
        and tell which query sees which token `(B, T, U b)`."""
        block = self.block_size
        index, marks = selection.index[:, columns], selection.marks
        if not marks.shape[1]:
            return self._chosen_units(layer, state, index)
        shown = marks.gather(1, index[..., None].expand(-1, -1, marks.shape[2]))
        used = shown.any(1)
        most = int(used.sum(1).max()) if used.shape[1] else 0
        units = earliest(used, most)
        shown = shown.gather(2, units[:, None].expand(-1, index.shape[1], -1))
        key, value = self._taken(layer, state, units)
        return key, value, shown.repeat_interleave(block, 2)

    def _chosen_units(self, layer: int, state: Tree, index: Tensor) -> Units:
        """Take as `_units` those that were chosen before, gathered once while the choice stands."""
        chosen = state["chosen"]

        def gathered() -> tuple[Tensor, Tensor, Tensor]:
            taken = chosen > 0
            most = int(taken.sum(2).max()) if len(chosen) else 0
            shown = taken[..., :most].repeat_interleave(self.block_size, 2)
            return *self._taken(layer, state, (chosen[:, 0, :most] - 1).clamp_min(0)), shown

        offloaded = layer in self.slots
        units = gathered() if offloaded else kept_beside(chosen, "units", gathered)
        return *units[:2], units[2].expand(-1, index.shape[1], -1)

    def _taken(self, layer: int, state: Tree, units: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values `(B, Hkv, U b, D)` of `units` `(B, U)`."""
        batch, most = units.shape
        if not most:
            return state["recent_key"][:, :, :0], state["recent_value"][:, :, :0]
        rows = [row for row in range(batch) for _ in range(most)]
        numbers = units.flatten().tolist()
        pages = state[self.where][STORE]
        if layer in self.slots:
            device = units.device
            taken = self.slots[layer].take(pages, HELD, rows, numbers, UNITS_A_PAGE, device)
        else:
            taken = take(pages, HELD, rows, numbers, UNITS_A_PAGE)
        key, value = (t.unflatten(0, (batch, most)).transpose(1, 2).flatten(2, 3) for t in taken)
        return key, value
