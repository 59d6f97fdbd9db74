"""The exact store: vectors on one device, for one shared set or for each row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwrap.io.reading import inside
from memwrap.ops import neighbours
from memwrap.stores.base import (
    NONE,
    Entries,
    Neighbours,
    Store,
    check_k,
    check_names,
    nothing_found,
    numbers_of,
)
from memwrap.stores.files import read_arrays, write_arrays

FILE = "store.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
           "float64": torch.float64}  # fmt: skip


class TorchStore(Store):
    """Exact search with torch, in the memory of one device.

    With `rows=(B, H)` it holds a set of vectors for every row of a batch and every head: all shapes
    then begin with these dimensions, and entries are numbered within a row. A store of rows keeps
    vectors only, no values and no documents.

    Args:
        dim: width of the vectors.
        metric: `"l2"` or `"ip"`.
        rows: leading dimensions, the batch first; `()` for one shared set.
        capacity: at most so many entries a row: of too many the oldest go (a ring). `None`: all.
        dtype, device: of the vectors kept.
    """

    kind = "torch"

    def __init__(
        self,
        dim: int,
        metric: str = "l2",
        *,
        rows: tuple[int, ...] = (),
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dim, metric)
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            raise ValueError(f"`capacity` is {capacity!r}; it must be at least 1, or None.")
        self.rows, self.capacity = tuple(rows), capacity
        self._lead = self.rows or (1,)
        self.vectors = torch.zeros(*self._lead, 0, dim, dtype=dtype, device=device)
        self.present = torch.zeros(self._lead[0], 0, dtype=torch.bool, device=device)
        self.counts = torch.zeros(self._lead[0], dtype=torch.long)  # entries that ever came
        self._entries = Entries.make(0)
        self._documents: list[str] = []

    @property
    def documents(self) -> Sequence[str]:
        return tuple(self._documents)

    def add(
        self,
        vectors: Tensor,
        *,
        values: Any = None,
        document: str | None = None,
        spans: Any = None,
        cursor: Any = None,
        valid: Tensor | None = None,
    ) -> range:
        """Add entries; see `Store.add`.

        Args:
            vectors: `(N, D)`, or `(*rows, N, D)`.
            valid: `(B, N)` bool: which of them each row of the batch gets; None for all.

        Returns:
            The new entries' numbers; those of row 0 where rows differ.
        """
        check_names(document, cursor)
        vectors = self._checked(vectors)
        if tuple(vectors.shape[:-2]) != self.rows:
            raise ValueError(
                f"`vectors` has shape {tuple(vectors.shape)}; it needs (*{self.rows}, N, "
                f"{self.dim})."
            )
        if self.rows and not (values is None and document is None and spans is None):
            raise ValueError("A store of rows keeps vectors only; leave values and documents out.")
        new = Entries.make(vectors.shape[-2], values, self._number(document), spans)
        first = int(self.counts[0])
        block = (vectors if self.rows else vectors[None]).to(self.vectors)
        if not bool(block.isfinite().all()):
            raise ValueError(
                f"`vectors` overflow {block.dtype}; make the store with another dtype."
            )
        chosen = torch.ones(self._lead[0], block.shape[-2], dtype=torch.bool)
        if valid is not None:
            if tuple(valid.shape) != tuple(chosen.shape) or valid.dtype != torch.bool:
                raise ValueError(
                    f"`valid` is {valid.dtype} {tuple(valid.shape)}; it must be bool "
                    f"{tuple(chosen.shape)}."
                )
            chosen = valid.cpu()
        kept = Entries.cat([self._entries, new[chosen[0].numpy()]])
        self._grow(int((self.counts + chosen.sum(1)).max()))
        for row in range(self._lead[0]):  # rows of a batch, each with its own number of entries
            self._put(row, block[row], chosen[row].nonzero().squeeze(1))
        if not self.rows:
            self._entries = kept if self.capacity is None else kept[-self.capacity :]
        if document is not None and document not in self._documents:
            self._documents.append(document)
        self.cursor = cursor if cursor is not None else self.cursor
        return range(first, int(self.counts[0]))

    def _number(self, name: str | None) -> int | None:
        """Return the number of a document, known or new."""
        if name is None or name not in self._documents:
            return None if name is None else len(self._documents)
        return self._documents.index(name)

    def _grow(self, count: int) -> None:
        """Make room for `count` entries a row, at most `capacity`."""
        have = self.vectors.shape[-2]
        need = count if self.capacity is None else min(count, self.capacity)
        if need <= have:
            return
        size = max(need, min(2 * have, self.capacity or 2 * have))
        grown = self.vectors.new_zeros(*self._lead, size, self.dim)
        grown[..., :have, :] = self.vectors
        present = self.present.new_zeros(self._lead[0], size)
        present[:, :have] = self.present
        self.vectors, self.present = grown, present

    def _put(self, row: int, block: Tensor, columns: Tensor) -> None:
        count = int(self.counts[row]) + len(columns)
        numbers = torch.arange(count - len(columns), count)
        if self.capacity is not None:
            numbers, columns = numbers[-self.capacity :], columns[-self.capacity :]
            numbers = numbers % self.capacity
        places, columns = numbers.to(block.device), columns.to(block.device)
        self.vectors[row].index_copy_(-2, places, block.index_select(-2, columns))
        self.present[row, places] = True
        self.counts[row] = count

    def _numbers(self, row: int) -> Tensor:
        """Return the entries' numbers at the places of a row."""
        places = torch.arange(self.vectors.shape[-2])
        if self.capacity is None:
            return places
        last = int(self.counts[row]) - 1
        return last - (last - places) % self.capacity

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """See `Store.search`; with rows `(*rows, Q, D)` queries and results `(*rows, Q, k)`."""
        check_k(k)
        target = queries.device
        q = self._checked(queries, "queries").to(self.vectors.device)
        if tuple(q.shape[:-2]) != self.rows:
            raise ValueError(
                f"`queries` has shape {tuple(q.shape)}; it needs (*{self.rows}, Q, {self.dim})."
            )
        if not bool(self.present.any()):
            return nothing_found(queries, k, self.metric)
        lead = self._lead
        present = self.present.view(lead[0], *[1] * (len(lead) - 1), -1).expand(*lead, -1)
        scores, places = neighbours.nearest(
            q if self.rows else q[None], self.vectors, k, self.metric, present
        )
        if self.capacity is not None:
            names = torch.stack([self._numbers(r) for r in range(lead[0])]).to(places.device)
            flat = names.gather(1, places.clamp_min(0).flatten(1)).view_as(places)
            places = flat.masked_fill(places < 0, -1)
        if not self.rows:
            scores, places = scores[0], places[0]
        return Neighbours(scores.to(target), places.to(target))

    def entries(self, ids: Tensor | np.ndarray) -> Entries:
        if self.rows:
            raise ValueError("A store of rows keeps vectors only.")
        index = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        count = int(self.counts[0])
        if index.size and (index.min() < NONE or index.max() >= count):
            raise ValueError(f"`ids` must be from {NONE} to {count - 1}.")
        old = count - len(self._entries)
        padded = Entries.cat([self._entries, Entries.make(1)])
        return padded[np.where(index < old, len(self._entries), index - old)]

    def remove(self, ids: Iterable[int], row: int = 0) -> int:
        """See `Store.remove`; `row` of the batch."""
        numbers = self._numbers(row)
        wanted = torch.as_tensor(numbers_of(ids), dtype=torch.long)
        hit = torch.isin(numbers, wanted).to(self.present.device) & self.present[row]
        self.present[row] &= ~hit
        return int(hit.sum())

    def clear(self, rows: Tensor | None = None) -> None:
        """Remove everything, or everything of the batch rows `rows` `(n,)`."""
        chosen = torch.arange(self._lead[0]) if rows is None else rows.cpu()
        self.present[chosen.to(self.present.device)] = False
        self.counts[chosen] = 0
        if rows is None:
            self._entries, self._documents, self.cursor = Entries.make(0), [], None

    def of_document(self, number: int) -> list[int]:
        old = int(self.counts[0]) - len(self._entries)
        return (np.flatnonzero(self._entries.documents == number) + old).tolist()

    def __len__(self) -> int:
        return int(self.present.sum())

    @property
    def nbytes(self) -> int:
        tensors = (self.vectors, self.present, self.counts)
        return sum(t.numel() * t.element_size() for t in tensors) + self._entries.nbytes

    def save(self, path: str | Path) -> None:
        about = {
            "kind": self.kind, "dim": self.dim, "metric": self.metric, "rows": list(self.rows),
            "capacity": self.capacity, "documents": self._documents, "notes": self.notes,
            "cursor": self.cursor, "dtype": str(self.vectors.dtype).removeprefix("torch."),
            "id": self.identity,
        }  # fmt: skip
        most = int(self.counts.max())
        used = most if self.capacity is None else min(most, self.capacity)
        arrays = {name: getattr(self._entries, name) for name in Entries.FIELDS}
        # bfloat16 is no numpy type; float32 holds it exactly.
        wide = torch.float64 if self.vectors.dtype == torch.float64 else torch.float32
        arrays["vectors"] = self.vectors[..., :used, :].to(wide).cpu().numpy()
        arrays |= {"there": self.present[:, :used].cpu().numpy(), "counts": self.counts.numpy()}
        write_arrays(Path(path) / FILE, arrays, about)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> TorchStore:
        file = inside(Path(path), FILE)
        arrays, about = read_arrays(file)
        try:
            store = cls(
                about["dim"], about["metric"], rows=tuple(about["rows"]),
                capacity=about["capacity"], dtype=_DTYPES[about["dtype"]], device=device,
            )  # fmt: skip
            store._take(arrays, about)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged: {error}.") from error
        return store

    def _take(self, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """Become what a file holds.

        Raises:
            KeyError, ValueError: for what is no store.
        """
        count = arrays["vectors"].shape[-2]
        wide = np.float64 if self.vectors.dtype == torch.float64 else np.float32
        single = 0 if self.rows else int(arrays["counts"].max(initial=0))
        kept = single if self.capacity is None else min(single, self.capacity)
        wanted = {
            "vectors": (wide, (*self._lead, count, self.dim)),
            "there": (np.bool_, (self._lead[0], count)), "counts": (np.int64, (self._lead[0],)),
            **{name: (np.int64, (kept,)) for name in Entries.FIELDS},
        }  # fmt: skip
        for name, (kind, shape) in wanted.items():
            if arrays[name].dtype != kind or arrays[name].shape != shape:
                raise ValueError(f"its {name} are {arrays[name].dtype} {arrays[name].shape}")
        counts, present = arrays["counts"], arrays["there"]
        places = np.minimum(counts, count if self.capacity is None else self.capacity)
        if (counts < 0).any() or (places > count).any() or places.max(initial=0) != count:
            raise ValueError("its counts are out of range")
        if (present & (np.arange(count) >= places[:, None])).any():
            raise ValueError("it has entries that never came")
        names = about["documents"]
        numbers = arrays["documents"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its documents have no names")
        if len({*names}) != len(names):
            raise ValueError("it names a document twice")
        if numbers.size and not -1 <= numbers.min() <= numbers.max() < len(names):
            raise ValueError("it names documents that are not there")
        if not isinstance(about["notes"], dict) or not np.isfinite(arrays["vectors"]).all():
            raise ValueError("its vectors are not finite, or its notes are none")
        entries = Entries(*[arrays[name].copy() for name in Entries.FIELDS])
        low = min(getattr(entries, name).min(initial=0) for name in Entries.FIELDS)
        if low < NONE or not entries.has_order():
            raise ValueError("its values or spans are out of range")
        self.vectors = torch.from_numpy(arrays["vectors"].copy()).to(self.vectors)
        self.present = torch.from_numpy(present.copy()).to(self.present.device)
        self.counts = torch.from_numpy(counts.copy())
        self._entries = entries
        self._documents, self.notes = list(names), about["notes"]
        self.cursor, self.identity = about["cursor"], str(about.get("id", ""))
