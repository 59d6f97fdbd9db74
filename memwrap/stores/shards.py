"""Vectors on disk in shards: each is one file that is there whole or not at all.

What is committed is what the shard files hold, in the order of their numbers; nothing else says
so. A process that is killed loses what it had not committed, and the cursor of the last shard says
where to go on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memwrap.stores.base import NONE, Entries, numbers_of
from memwrap.stores.files import HEADER, head_of, mapped, read_arrays, small_arrays, write_arrays

REMOVED = "removed.safetensors"
_CODES = {"float16": "F16", "float32": "F32"}


class Shards:
    """The vectors of a store and what stands beside them, in memory or in a folder.

    Args:
        dim: width of the vectors.
        dtype: `"float16"` or `"float32"`, as they are kept.
        folder: where the shards are; None keeps all in memory.
        store: identity of the store that they belong to.
    """

    def __init__(self, dim: int, dtype: str, folder: Path | None = None, store: str = "") -> None:
        self.dim, self.dtype, self.folder, self.store = dim, np.dtype(dtype), folder, store
        self.documents: list[str] = []
        self.cursor: Any = None
        self.committed = 0
        self.removed: set[int] = set()
        self._numbers: dict[str, int] = {}
        self._paths: list[Path] = []
        self._firsts: list[int] = [0]  # the first entry of every shard, and behind the last
        self.checksums: list[int] = []  # of the shards' contents
        self._saved_documents = 0
        self._pending: list[np.ndarray] = []
        self._pending_entries: list[Entries] = []
        self._pending_cursor: Any = None
        self._before: tuple[int, Any] = (0, None)  # documents and cursor before the last append
        self._entries = Entries.make(0)
        self._maps: dict[int, np.ndarray] = {}
        if folder is not None:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        paths = sorted(folder.glob("shard-*.safetensors"))
        parts = []
        for number, path in enumerate(paths):
            want = _name(number)
            if path.name != want:
                raise FileNotFoundError(f"{folder / want} is missing; the store is not whole.")
            about, head, checksum = head_of(path)
            self._check_head(path, about, head)
            self._learn(about["documents"])
            self.cursor = about["cursor"]
            parts.append(Entries(*small_arrays(path, Entries.FIELDS)))
            self._check_columns(path, parts[-1])
            self._added(path, about["count"], checksum)
        self._entries = Entries.cat(parts)
        self._saved_documents = len(self.documents)
        if (folder / REMOVED).is_file():
            ids = read_arrays(folder / REMOVED)[0].get("ids", np.empty(0))
            good = ids.dtype == np.int64 and ids.ndim == 1 and ids.size > 0
            if not good or _outside(ids, 0, self.committed) or bool((np.diff(ids) < 1).any()):
                raise ValueError(f"{folder / REMOVED} is damaged: it names other entries.")
            self.removed = set(ids.tolist())

    def _check_head(self, path: Path, about: dict[str, Any], head: dict[str, Any]) -> None:
        """Refuse a shard that does not go on where the one before ended, or holds other arrays."""
        count, names = about.get("count"), about.get("documents")
        if about.get("store") != self.store:
            raise ValueError(f"{path} is of another store than the {HEADER} beside it.")
        if about.get("first") != self.committed or type(count) is not int or count < 1:
            raise ValueError(f"{path} is damaged or of another store: it begins elsewhere.")
        wanted = {name: ["I32", [count]] for name in Entries.FIELDS}
        wanted["vectors"] = [_CODES[self.dtype.name], [count, self.dim]]
        got = {name: [entry["dtype"], entry["shape"]] for name, entry in head.items()}
        for name in sorted(wanted.keys() | got.keys()):
            if got.get(name) != wanted.get(name):
                raise ValueError(
                    f"{path} is damaged or of another store: its {name} are {got.get(name)}, "
                    f"{wanted.get(name)} is needed."
                )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} is damaged: its documents have no names.")
        if len({*names} - self._numbers.keys()) != len(names) or "cursor" not in about:
            raise ValueError(f"{path} is damaged: it names a document again.")

    def _check_columns(self, path: Path, entries: Entries) -> None:
        limits = {"documents": len(self.documents)}
        for name in Entries.FIELDS:
            if _outside(getattr(entries, name), NONE, limits.get(name, 2**31)):
                raise ValueError(f"{path} is damaged: its {name} are out of range.")
        if not entries.has_order():
            raise ValueError(f"{path} is damaged: its spans end before they start.")

    def _learn(self, names: Iterable[str]) -> None:
        for name in names:
            self._numbers[name] = len(self.documents)
            self.documents.append(name)

    def _added(self, path: Path, count: int, checksum: int) -> None:
        self._paths.append(path)
        self.checksums.append(checksum)
        self.committed += count
        self._firsts.append(self.committed)

    def checksums_of(self, count: int) -> list[int] | None:
        """Give the checksums of the shards that hold the first `count` entries; None if that cuts a
        shard."""
        return self.checksums[: self._firsts.index(count)] if count in self._firsts else None

    def copy(self) -> Shards:
        """Copy the entries in memory; the copy then goes its own way."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict, set)):
                setattr(new, name, copy.copy(value))
        return new

    @property
    def pending(self) -> int:
        """Entries that are not committed."""
        return sum(len(block) for block in self._pending)

    def __len__(self) -> int:
        """Count the entries that ever came."""
        return self.committed + self.pending

    def append(
        self, vectors: np.ndarray, values: Any, document: str | None, spans: Any, cursor: Any
    ) -> range:
        """Add entries to those that wait; nothing is added if an argument is refused."""
        number = None
        if document is not None:
            number = self._numbers.get(document, len(self.documents))
        entries = Entries.make(len(vectors), values, number, spans)
        entries.check_range()
        with np.errstate(over="ignore"):
            kept = vectors.astype(self.dtype)
        if not np.isfinite(kept).all():
            raise ValueError("`vectors` overflow float16; make the store with dtype='float32'.")
        self._before = len(self.documents), self._pending_cursor
        if document is not None and document not in self._numbers:
            self._learn([document])
        first = len(self)
        self._pending.append(kept)
        self._pending_entries.append(entries)
        self._pending_cursor = cursor if cursor is not None else self._pending_cursor
        return range(first, len(self))

    def withdraw(self, first: int) -> None:
        """Forget the last `append`, which began at entry `first` and still waits."""
        if self._pending and len(self) - len(self._pending[-1]) == first:
            self._pending.pop()
            self._pending_entries.pop()
            known, self._pending_cursor = self._before
            for name in self.documents[known:]:
                del self._numbers[name]
            del self.documents[known:]

    def commit(self) -> None:
        """Write what waits as one shard; it goes on waiting if that fails."""
        if not self._pending or self.folder is None:
            return
        block, entries = np.concatenate(self._pending), Entries.cat(self._pending_entries)
        path = self.folder / _name(len(self._paths))
        about = {
            "store": self.store, "first": self.committed, "count": len(block),
            "cursor": self._pending_cursor,
            "documents": self.documents[self._saved_documents :],
        }  # fmt: skip
        columns = {name: getattr(entries, name).astype(np.int32) for name in Entries.FIELDS}
        if len(block):
            try:
                write_arrays(path, {"vectors": block, **columns}, about)
                checksum = head_of(path)[2]
            except BaseException:
                path.unlink(missing_ok=True)  # nothing points to it yet
                raise
            self._added(path, len(block), checksum)
            self._entries = Entries.cat([self._entries, Entries(*columns.values())])
            self._saved_documents = len(self.documents)
            self.cursor = self._pending_cursor
        self._pending, self._pending_entries = [], []

    def entries(self, index: np.ndarray) -> Entries:
        """Return the columns at the entries `index` (any shape); -1 gives -1."""
        if self._pending_entries:
            everything = Entries.cat([self._entries, *self._pending_entries])
        else:
            everything = self._entries
        if _outside(index, NONE, len(everything)):
            raise ValueError(f"`ids` must be from -1 to {len(everything) - 1}.")
        if not len(everything):
            return Entries.make(1)[np.zeros_like(index)]
        entries = everything[index]
        missing = index < 0
        if missing.any():
            entries = Entries(*[np.where(missing, -1, getattr(entries, n)) for n in Entries.FIELDS])
        return entries

    def of_document(self, number: int) -> list[int]:
        """Return the entries of a document that were not removed."""
        everything = Entries.cat([self._entries, *self._pending_entries])
        return [i for i in np.flatnonzero(everything.documents == number).tolist()
                if i not in self.removed]  # fmt: skip

    def blocks(self, first: int = 0, *, check: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate over vectors from entry `first` on, `(number of the first, block)`; shards may be
        checked against their checksums on the way."""
        for number, path in enumerate(self._paths):
            start, end = self._firsts[number], self._firsts[number + 1]
            if end > first:
                block = read_arrays(path)[0]["vectors"] if check else self._map(number)
                if check and not np.isfinite(block).all():
                    raise ValueError(f"{path} is damaged: it has vectors that are not finite.")
                yield max(first, start), block[max(0, first - start) :]
        start = self.committed
        for block in self._pending:
            if start + len(block) > first:
                yield max(first, start), block[max(0, first - start) :]
            start += len(block)

    def gather(self, index: np.ndarray) -> np.ndarray:
        """Return the vectors `(n, D)` of the entries `index` `(n,)`, as they are kept."""
        result = np.empty((len(index), self.dim), self.dtype)
        shard = np.searchsorted(self._firsts, index, side="right") - 1
        for number in np.unique(shard):
            rows = np.flatnonzero(shard == number)
            if number < len(self._paths):
                source, first = self._map(int(number)), self._firsts[number]
            else:
                source, first = np.concatenate(self._pending), self.committed
            result[rows] = source[index[rows] - first]
        return result

    def _map(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._maps[number] = mapped(self._paths[number], "vectors")
        return self._maps[number]

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            ValueError: names the damaged file.
        """
        for path in self._paths:
            if not np.isfinite(read_arrays(path)[0]["vectors"]).all():
                raise ValueError(f"{path} is damaged: it has vectors that are not finite.")

    def remove(self, ids: Iterable[int]) -> int:
        """Mark entries as removed; their numbers stay taken."""
        new = {number for number in numbers_of(ids) if 0 <= number < len(self)} - self.removed
        self.save_removed(self.removed | new)
        self.removed = self.removed | new
        return len(new)

    def save_removed(self, removed: set[int] | None = None) -> None:
        """Write which entries are removed. What waits is committed first: a mark must never
        meet another entry after a crash."""
        removed = self.removed if removed is None else removed
        if self.folder is not None and removed:
            self.commit()
            array = np.array(sorted(removed), np.int64)
            write_arrays(self.folder / REMOVED, {"ids": array}, {})

    def clear(self) -> None:
        """Forget everything. Files of it have gone before."""
        self.__init__(self.dim, self.dtype.name, self.folder, self.store)  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes in memory: what waits, and the columns."""
        waiting = sum(b.nbytes for b in self._pending) + sum(
            e.nbytes for e in self._pending_entries
        )
        return waiting + self._entries.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the shards' files."""
        return sum(path.stat().st_size for path in self._paths)


def _outside(array: np.ndarray, least: int, end: int) -> bool:
    return bool(array.size) and (int(array.min()) < least or int(array.max()) >= end)


def _name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"
