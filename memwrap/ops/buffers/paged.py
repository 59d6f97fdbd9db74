"""A store in pages: entries are appended without copying those that are there.

A store is a tree `{"0": page, "1": page, ...}` (`memwrap.state.trees`, "store"); a page is a
dict of tensors `(B, n, ...)`, n entries of the rows from number `page * size` on, n = size but for
the last page. Pages are never changed: an append makes a new last page and shares the others, so
that states stay independent.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from memwrap.ops import narrowed
from memwrap.ops.buffers.host_prefetch import moved

Pages = dict[str, dict[str, Tensor]]


def put(buffer: Tensor, at: Tensor, new: Tensor, count: Tensor, dim: int) -> Tensor:
    """Put each row's first `count` new entries into a buffer, from slot `at` on.

    Args:
        buffer: entries along `dim`; what is there from `at` to `at + count` is replaced.
        at, count: `(B,)`.
        new: like `buffer`, with its own number of entries.
    """
    if new.shape[dim] == 0:
        return buffer
    source = torch.arange(buffer.shape[dim], device=buffer.device) - at[:, None]
    shape = [len(at), *[1] * (dim - 1), -1, *[1] * (buffer.dim() - dim - 1)]
    fresh = ((source >= 0) & (source < count[:, None])).view(shape)
    index = source.clamp(0, new.shape[dim] - 1).view(shape).expand_as(buffer)
    return torch.where(fresh, narrowed(new, buffer.dtype).gather(dim, index), buffer)


def append(pages: Pages, counts: Tensor, new: dict[str, Tensor], more: Tensor, size: int) -> Pages:
    """Append each row's first `more` `(B,)` entries of `new` `(B, M, ...)` to the `counts` `(B,)`
    that a store has; pages hold `size` entries."""
    if not bool((more > 0).any()):
        return pages
    if bool((counts == number_of(pages)).all()) and bool((more == more[0]).all()):
        return _append_alike(pages, int(counts[0]), new, int(more[0]), size)
    first = int(counts[more > 0].min()) // size
    total = int((counts + more).max())
    length = max(total, number_of(pages))
    result = dict(pages)
    for page in range(first, -(-total // size)):
        page_length = min(size, length - page * size)
        result[str(page)] = {}
        for name, rows in new.items():
            old = pages["0"][name][:, :0] if str(page) not in pages else pages[str(page)][name]
            shape = (len(old), page_length - old.shape[1], *old.shape[2:])
            old = torch.cat([old, old.new_zeros(shape)], 1)
            at, rows = (t.to(old.device) for t in (counts - page * size, rows))
            result[str(page)][name] = put(old, at, rows, more.to(old.device), 1)
    return result


def _append_alike(pages: Pages, count: int, new: dict[str, Tensor], more: int, size: int) -> Pages:
    """Append as `append`, where all rows have `count` entries, no fewer than the pages hold, and
    get `more`."""
    result = dict(pages)
    for page in range(count // size, -(-(count + more) // size)):
        first, stop = max(count, page * size), min((page + 1) * size, count + more)
        known = pages.get(str(page))
        made = result[str(page)] = {}
        for name, rows in new.items():
            like = pages["0"][name]
            old = like[:, :0] if known is None else known[name]
            fresh = narrowed(rows[:, first - count : stop - count], like.dtype).to(like.device)
            made[name] = torch.cat([old, fresh], 1)
    return result


def take(
    pages: Pages, names: tuple[str, ...], rows: list[int], entries: list[int], size: int
) -> list[Tensor]:
    """Take entries of the given rows, for each name `(n, ...)`; pages hold `size` entries."""
    by_page: dict[int, list[int]] = {}
    for index, entry in enumerate(entries):
        by_page.setdefault(entry // size, []).append(index)
    order = [index for indices in by_page.values() for index in indices]
    ordered = order == sorted(order)
    back = [] if ordered else sorted(range(len(order)), key=order.__getitem__)
    result = []
    for name in names:
        parts = [] if by_page else [pages["0"][name][:0, :0].flatten(0, 1)]
        for page, indices in by_page.items():
            tensor = pages[str(page)][name]
            at = [rows[i] * tensor.shape[1] + entries[i] % size for i in indices]
            places = torch.tensor(at, device=tensor.device)
            parts.append(tensor.flatten(0, 1).index_select(0, places))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not ordered:
            joined = joined[torch.tensor(back, dtype=torch.long, device=joined.device)]
        result.append(joined)
    return result


def number_of(pages: Pages) -> int:
    """Count the entries of the row that has most."""
    return sum(next(iter(page.values())).shape[1] for page in pages.values())


class SlotCache:
    """Entries of a store on the host that a device has at hand: the least recently used go first.

    It never changes a result. Pages are immutable, so an entry is known by its page's tensor, row
    and slot; any number of states and threads may share one cache.

    Attributes:
        hits, misses: entries found here, and fetched from the host.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.hits = self.misses = 0
        self._held: OrderedDict[tuple[int, int, int], tuple[int, Any]] = OrderedDict()
        self._buffers: list[Tensor] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> SlotCache:
        return SlotCache(self.slots)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in self._buffers)

    def take(
        self,
        pages: Pages,
        names: tuple[str, ...],
        rows: list[int],
        entries: list[int],
        size: int,
        device: torch.device,
    ) -> list[Tensor]:
        """Take entries as `take` does, on `device`."""
        if torch.is_grad_enabled():  # what is held here belongs to no graph
            return [moved(t, device) for t in take(pages, names, rows, entries, size)]
        with self._lock:
            return self._taken_or_fetched(pages, names, rows, entries, size, device)

    def _taken_or_fetched(
        self,
        pages: Pages,
        names: tuple[str, ...],
        rows: list[int],
        entries: list[int],
        size: int,
        device: torch.device,
    ) -> list[Tensor]:
        if not self._buffers or self._buffers[0].device != device:
            self._held.clear()
            with torch.inference_mode(False):  # written in whatever mode comes later
                self._buffers = [
                    pages["0"][n].new_zeros((self.slots, *pages["0"][n].shape[2:]), device=device)
                    for n in names
                ]
        keys, slots, missing = [], [], []
        for index, (row, entry) in enumerate(zip(rows, entries, strict=True)):
            tensor = pages[str(entry // size)][names[0]]
            key = (id(tensor), row, entry % size)
            slot, owner = self._held.get(key, (-1, None))
            if owner is None or owner() is not tensor:
                slot = -1
                missing.append(index)
            else:
                self._held.move_to_end(key)
            keys.append((key, tensor))
            slots.append(slot)
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        where = [rows[i] for i in missing], [entries[i] for i in missing]
        fetched = take(pages, names, *where, size)
        fetched = [moved(t, device) for t in fetched]
        held = torch.tensor(slots, dtype=torch.long, device=device)
        result = []
        for buffer, new in zip(self._buffers, fetched, strict=True):
            values = buffer[held.clamp_min(0)]
            at = torch.tensor(missing, dtype=torch.long, device=device)
            result.append(values.index_copy(0, at, new))
        self._keep([keys[i] for i in missing], fetched, set(slots))
        return result

    def _keep(self, keys: list[Any], fetched: list[Tensor], used: set[int]) -> None:
        """Give fetched entries slots: free ones, then those of the least recently used."""
        free = [s for s in range(self.slots - 1, -1, -1) if s not in self._taken()]
        slots: list[int] = []
        chosen: list[int] = []
        for index, (key, tensor) in enumerate(keys):
            if free:
                slot = free.pop()
            else:
                oldest, (slot, _) = next(iter(self._held.items()), (None, (-1, None)))
                if oldest is None or slot in used or slot in slots:
                    break  # more are needed at once than there are slots
                del self._held[oldest]
            self._held.pop(key, None)
            self._held[key] = (slot, weakref.ref(tensor))
            slots.append(slot)
            chosen.append(index)
        if slots:
            device = self._buffers[0].device
            at = torch.tensor(slots, dtype=torch.long, device=device)
            for buffer, new in zip(self._buffers, fetched, strict=True):
                buffer[at] = new[torch.tensor(chosen, dtype=torch.long, device=device)]

    def _taken(self) -> set[int]:
        return {slot for slot, _ in self._held.values()}
