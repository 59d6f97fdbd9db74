"""Vectors on disk in shards: each is one file that is there whole or not at all.

What is committed is what the shard files hold, in the order of their numbers; nothing else says
so. A process that is killed loses what it had not committed, and the cursor of the last shard says
where to go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from memwrap.stores.base import Entries
from memwrap.stores.files import about_of, mapped, read_arrays, write_arrays

REMOVED = "removed.safetensors"
_LARGEST = np.iinfo(np.int32).max


class Shards:
    """The vectors of a store and what stands beside them, in memory or in a folder.

    Args:
        dim: width of the vectors.
        dtype: `"float16"` or `"float32"`, as they are kept.
        folder: where the shards are; None keeps all in memory.
    """

    def __init__(self, dim: int, dtype: str, folder: Path | None = None) -> None:
        self.dim, self.dtype, self.folder = dim, np.dtype(dtype), folder
        self.documents: list[str] = []
        self.cursor: Any = None
        self.committed = 0
        self.removed: set[int] = set()
        self._numbers: dict[str, int] = {}
        self._paths: list[Path] = []
        self._firsts: list[int] = [0]  # the first entry of every shard, and behind the last
        self._saved_documents = 0
        self._pending: list[np.ndarray] = []
        self._pending_entries: list[Entries] = []
        self._pending_cursor: Any = None
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
            about = about_of(path)
            if about.get("first") != self.committed:
                raise ValueError(f"{path} is damaged or of another store: it begins elsewhere.")
            self._learn(about["documents"])
            self.cursor = about["cursor"]
            parts.append(Entries(*[np.asarray(mapped(path, n)) for n in Entries.FIELDS]))
            if len(parts[-1]) != about["count"]:
                raise ValueError(f"{path} is damaged: it has {len(parts[-1])} entries.")
            self._added(path, about["count"])
        self._entries = Entries.cat(parts)
        self._saved_documents = len(self.documents)
        if (folder / REMOVED).is_file():
            arrays, _ = read_arrays(folder / REMOVED)
            self.removed = set(arrays["ids"].tolist())

    def _learn(self, names: Iterable[str]) -> None:
        for name in names:
            self._numbers[name] = len(self.documents)
            self.documents.append(name)

    def _added(self, path: Path, count: int) -> None:
        self._paths.append(path)
        self.committed += count
        self._firsts.append(self.committed)

    @property
    def pending(self) -> int:
        """Entries that are not committed."""
        return sum(len(block) for block in self._pending)

    def __len__(self) -> int:
        """Entries that ever came."""
        return self.committed + self.pending

    def append(
        self, vectors: np.ndarray, values: Any, document: str | None, spans: Any, cursor: Any
    ) -> range:
        """Add entries to those that wait; nothing is added if an argument is refused."""
        number = None
        if document is not None:
            number = self._numbers.get(document, len(self.documents))
        entries = Entries.make(len(vectors), values, number, spans)
        for name in Entries.FIELDS:
            column = getattr(entries, name)
            if column.size and (column.max() > _LARGEST or column.min() < -1):
                raise ValueError(f"`{name}` must be from -1 to {_LARGEST}.")
        with np.errstate(over="ignore"):
            kept = vectors.astype(self.dtype)
        if not np.isfinite(kept).all():
            raise ValueError("`vectors` overflow float16; make the store with dtype='float32'.")
        if document is not None and document not in self._numbers:
            self._learn([document])
        first = len(self)
        self._pending.append(kept)
        self._pending_entries.append(entries)
        self._pending_cursor = cursor if cursor is not None else self._pending_cursor
        return range(first, len(self))

    def commit(self) -> None:
        """Write what waits as one shard."""
        if not self._pending or self.folder is None:
            return
        block, entries = np.concatenate(self._pending), Entries.cat(self._pending_entries)
        path = self.folder / _name(len(self._paths))
        about = {
            "first": self.committed, "count": len(block), "cursor": self._pending_cursor,
            "documents": self.documents[self._saved_documents :],
        }  # fmt: skip
        columns = {name: getattr(entries, name).astype(np.int32) for name in Entries.FIELDS}
        if len(block):
            write_arrays(path, {"vectors": block, **columns}, about)
            self._added(path, len(block))
            self._entries = Entries.cat([self._entries, Entries(*columns.values())])
            self._saved_documents = len(self.documents)
            self.cursor = self._pending_cursor
        self._pending, self._pending_entries = [], []

    def entries(self, index: np.ndarray) -> Entries:
        """The columns at the entries `index` (any shape); -1 gives -1."""
        if self._pending_entries:
            everything = Entries.cat([self._entries, *self._pending_entries])
        else:
            everything = self._entries
        if not len(everything):
            return Entries.make(1)[np.zeros_like(index)]
        found = everything[index]
        missing = index < 0
        if missing.any():
            found = Entries(*[np.where(missing, -1, getattr(found, n)) for n in Entries.FIELDS])
        return found

    def of_document(self, number: int) -> list[int]:
        """The entries of a document that were not removed."""
        everything = Entries.cat([self._entries, *self._pending_entries])
        return [i for i in np.flatnonzero(everything.documents == number).tolist()
                if i not in self.removed]  # fmt: skip

    def blocks(self, first: int = 0, *, check: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """Vectors from entry `first` on, `(number of the first, block)`; shards may be checked
        against their checksums on the way."""
        for number, path in enumerate(self._paths):
            start, end = self._firsts[number], self._firsts[number + 1]
            if end > first:
                block = read_arrays(path)[0]["vectors"] if check else self._map(number)
                yield max(first, start), block[max(0, first - start) :]
        start = self.committed
        for block in self._pending:
            if start + len(block) > first:
                yield max(first, start), block[max(0, first - start) :]
            start += len(block)

    def gather(self, index: np.ndarray) -> np.ndarray:
        """The vectors `(n, D)` of the entries `index` `(n,)`, as they are kept."""
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
            read_arrays(path)

    def remove(self, ids: Iterable[int]) -> int:
        """Mark entries as removed; their numbers stay taken."""
        new = {int(i) for i in ids if 0 <= int(i) < len(self)} - self.removed
        self.removed |= new
        self.save_removed()
        return len(new)

    def save_removed(self) -> None:
        """Write which entries are removed. What waits is committed first: a mark must never
        meet another entry after a crash."""
        if self.folder is not None and self.removed:
            self.commit()
            array = np.array(sorted(self.removed), np.int64)
            write_arrays(self.folder / REMOVED, {"ids": array}, {})

    def clear(self) -> None:
        """Forget everything, the last shard first: what is left after a crash is whole."""
        for path in [*reversed(self._paths)]:
            path.unlink()
        if self.folder is not None:
            (self.folder / REMOVED).unlink(missing_ok=True)
        self.__init__(self.dim, self.dtype.name, self.folder)  # type: ignore[misc]

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


def _name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"
