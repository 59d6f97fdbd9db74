"""The embedded store: a faiss index over vectors that lie in shards on disk."""

from __future__ import annotations

import copy
import os
import shutil
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.io.atomic_files import SCRATCH
from memwrap.io.whole_folders import settle
from memwrap.stores.base import Entries, Neighbours, Store, check_k, check_names, nothing_found
from memwrap.stores.files import (
    HEADER,
    checked_header,
    clear_files,
    copy_folder,
    file_checksum,
    holds_files,
    lock,
    write_json,
)
from memwrap.stores.gpu import GpuCopy
from memwrap.stores.index_files import (
    INDEX,
    add_to,
    check_lists,
    index_file,
    is_sane,
    read_index,
    train_index,
    verify_index,
    write_index,
    written_size,
)
from memwrap.stores.indexes import (
    choose_factory,
    faiss_module,
    measure_of,
    rescored,
    search_options,
    sifted,
)
from memwrap.stores.shards import REMOVED, Shards


class FaissStore(Store):
    """Vectors in shards on disk, searched through a faiss index.

    Vectors are kept as they came (in `dtype`) in shard files; the index is made of them and can be
    made again. Without a `path` all is in memory until `save`.

    Args:
        dim: width of the vectors.
        metric: `"l2"` or `"ip"`.
        path: a folder; a store that is there is continued.
        factory: a faiss factory string; None chooses by size when the index is built.
        dtype: `"float16"` or `"float32"`, of the vectors kept.
        shard_size: entries that wait in memory before they are written as one shard.
        effort: lists that are searched (`nprobe`), or candidates that a graph looks at
            (`efSearch`). None: 32 lists, 128 candidates (and at least 2 k).
        refine: with product codes, `refine * k` candidates are scored anew from the vectors kept.
        mmap: map the index from disk instead of reading it; the store is then read-only.
        checkpoint_seconds: while the index is built, it is written at least so often.
        device: where it is searched: `"cpu"`, `"cuda"`, `"cuda:N"`, or None, a GPU where faiss has
            one and takes the index (not with `mmap`). It is built and kept on the CPU.

    Raises:
        ImportError: if a GPU is asked for and faiss was built without them.
        ValueError: for a bad argument, or a damaged file; names it.
    """

    kind = "faiss"

    def __init__(
        self,
        dim: int,
        metric: str = "l2",
        *,
        path: str | Path | None = None,
        factory: str | None = None,
        dtype: str = "float16",
        shard_size: int = 131_072,
        effort: int | None = None,
        refine: int = 4,
        mmap: bool = False,
        checkpoint_seconds: float = 120.0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(dim, metric)
        if dtype not in ("float16", "float32"):
            raise ValueError(f"`dtype` is {dtype!r}; allowed: 'float16', 'float32'.")
        if shard_size < 1 or refine < 1:
            raise ValueError("`shard_size` and `refine` must be at least 1.")
        if mmap and device is not None and str(device) != "cpu":
            raise ValueError(f"`device` is {device!r}; an index that is mapped is on no GPU.")
        if factory is not None and not is_sane(factory, dim):
            raise ValueError(f"`factory` is {factory!r}; give one of faiss, such as 'HNSW32'.")
        self.gpu = GpuCopy("cpu" if mmap else device)
        self.factory, self.dtype, self.shard_size = factory, dtype, shard_size
        self.effort, self.refine, self.mmap = effort, refine, mmap
        self.checkpoint_seconds = checkpoint_seconds
        self.path = None if path is None else Path(path)
        self._index: Any = None
        self._indexed = 0  # entries in the index
        self.made_by = ""  # factory string of the index
        self._lock: Any = None
        self._selector: Any = None
        if self.path is not None:
            self._begin(self.path)
        self._shards = Shards(dim, self.dtype, self.path, self.identity)
        self.cursor = self._shards.cursor
        self._read_index()

    # Files

    def _begin(self, path: Path) -> None:
        settle(path)
        if not (path / HEADER).is_file():
            if holds_files(path):
                raise ValueError(f"{path} is not empty and holds no store; give another folder.")
            self._write_header(removals=False)
            return
        header = checked_header(path, kind=self.kind, dim=self.dim, metric=self.metric)
        factory = header["factory"]
        if factory is not None and not is_sane(factory, self.dim):
            raise ValueError(f"{path / HEADER} asks for the index {str(factory)[:60]!r}.")
        self.dtype, self.notes, self.identity = header["dtype"], header["notes"], header["id"]
        self.factory = self.factory or factory
        if header.get("cleared"):  # its process was stopped before the files had gone
            self._locked()
            clear_files(path)
            self._write_header(removals=False)
        if header["removals"] and not (path / REMOVED).is_file():
            raise FileNotFoundError(f"{path / REMOVED} is missing; the store is not whole.")

    def _write_header(self, removals: bool | None = None, cleared: bool = False) -> None:
        if self.path is not None:
            self._locked()
            names = ("kind", "dim", "metric", "dtype", "factory", "notes")
            some = bool(self._shards.removed) if removals is None else removals
            about: Any = {name: getattr(self, name) for name in names}
            about |= {"removals": some, "id": self.identity, "cleared": cleared}
            write_json(self.path / HEADER, about)

    def _locked(self) -> None:
        """Hold the folder for writing; the system gives it back when the process ends."""
        if self._lock is not None or self.path is None:
            return
        if self.mmap:
            raise ValueError(f"The store {self.path} was opened with mmap=True: it is read-only.")
        self.path.mkdir(parents=True, exist_ok=True)
        file = lock(self.path)
        if file is None:
            raise ValueError(f"Another process is writing the store {self.path}.")
        self._lock = weakref.finalize(self, os.close, file)
        for left in self.path.glob(SCRATCH):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Commit, and let others write the folder."""
        if self._lock is not None:
            self.commit()
            self._lock()
            self._lock = None

    def _read_index(self) -> None:
        if self.path is None or not (self.path / INDEX).is_file():
            return
        file, about = index_file(self.path, self._shards)
        if not self.mmap and file_checksum(file) != about["crc32"]:
            raise ValueError(f"{file} is damaged; delete it and {INDEX} to build the index anew.")
        self._index = read_index(file, self.dim, self.metric, about["count"], mmap=self.mmap)
        self._indexed, self.made_by = about["count"], about["factory"]

    def _write_index(self) -> None:
        if self.path is not None:
            self._locked()
            write_index(self.path, self._index, self.made_by, self._shards)

    # Entries

    def add(
        self,
        vectors: Tensor,
        *,
        values: Any = None,
        document: str | None = None,
        spans: Any = None,
        cursor: Any = None,
    ) -> range:
        """See `Store.add`. Entries become safe shard by shard; `commit` writes what waits."""
        self._locked()
        check_names(document, cursor)
        block = self._checked(vectors)
        if block.dim() != 2:
            raise ValueError(f"`vectors` has shape {tuple(block.shape)}; it needs (N, {self.dim}).")
        new = self._shards.append(block.cpu().numpy(), values, document, spans, cursor)
        if self.path is not None and self._shards.pending >= self.shard_size:
            try:
                self.commit()
            except BaseException:
                self._shards.withdraw(new.start)
                raise
        return new

    def commit(self) -> None:
        """Write the entries that wait as a shard: from then on they survive anything."""
        if self.path is not None and self._shards.pending:
            self._locked()
            self._shards.commit()
            self.cursor = self._shards.cursor

    def note(self, values: dict[str, Any]) -> None:
        super().note(values)
        self._write_header()

    def build(self, *, progress: bool = False) -> None:
        """Bring the index up to date, and write it where the store is on disk.

        A build that was stopped goes on from the last checkpoint; the shards are checked against
        their checksums on the way.
        """
        self.commit()
        count = len(self._shards)
        if count and (self._indexed < count or self._outgrown(count)):
            self._locked()
            self._grow(count, progress=progress, checkpoints=self.path is not None)
            self._write_index()
        self._write_header()

    def _wanted(self, count: int) -> str:
        return self.factory or choose_factory(count, self.dim, graph=self.gpu.number is None)

    def _outgrown(self, count: int) -> bool:
        fits = {self._wanted(count)}
        if self.factory is None and self._indexed == count:  # made where there is a GPU: it does
            fits.add(choose_factory(count, self.dim, graph=False))
        return self.made_by not in fits

    def _grow(self, count: int, *, progress: bool = False, checkpoints: bool = False) -> None:
        """Add to the index what it lacks; make another where the size asks for it."""
        faiss = faiss_module()
        wanted = self._wanted(count)
        if self._index is None or self._outgrown(count):
            check_lists(wanted, count)
            try:
                self._index = faiss.index_factory(self.dim, wanted, measure_of(self.metric))
            except RuntimeError as error:
                raise ValueError(f"faiss refuses `factory` {wanted!r}: {error}") from error
            self._indexed, self.made_by = 0, wanted
        if not self._index.is_trained:
            train_index(self._index, self._shards, wanted)
            if checkpoints:
                self._write_index()
        bar = tqdm(total=count, initial=self._indexed, desc="index", unit="vector",
                   disable=not progress)  # fmt: skip
        try:
            self._fill(bar, checkpoints)
        except BaseException:  # half of a block may be in it: back to what is on disk, or nothing
            self._index, self._indexed, self.made_by = None, 0, ""
            self._read_index()
            raise
        finally:
            bar.close()

    def _fill(self, bar: Any, checkpoints: bool) -> None:
        last = time.monotonic()
        for first, block in self._shards.blocks(self._indexed, check=checkpoints):
            for start in range(0, len(block), 16_384):
                piece = np.ascontiguousarray(block[start : start + 16_384], np.float32)
                add_to(self._index, piece, self.made_by)
                bar.update(len(piece))
            self._indexed = first + len(block)
            if checkpoints and time.monotonic() - last > self.checkpoint_seconds:
                self._write_index()
                last = time.monotonic()

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """See `Store.search`. Entries that are not in the index yet are put into it first."""
        check_k(k)
        q = self._checked(queries, "queries")
        if not len(self):
            return nothing_found(queries, k, self.metric)
        with self._busy:
            self._ready()
        lossy = any(code in self.made_by for code in ("PQ", "SQ", "LSH"))
        wanted = k * self.refine if lossy else k
        flat = q.reshape(-1, self.dim)
        array = np.ascontiguousarray(flat.cpu().numpy())
        scores, ids = self._searched(array, wanted)
        if ids.size and ids.max() >= len(self._shards):
            raise ValueError(f"The index of {self.path} is damaged: it names entries that are not.")
        if lossy:
            scores, ids = rescored(array, ids, k, self.metric, self._shards.gather)
        scores[ids < 0] = np.inf if self.metric == "l2" else -np.inf  # faiss: its largest number
        shape = (*queries.shape[:-1], k)
        return Neighbours(
            torch.from_numpy(scores).to(queries.device).view(shape),
            torch.from_numpy(ids).to(queries.device).view(shape),
        )

    def _ready(self) -> None:
        count = len(self._shards)
        if self.mmap and self._indexed < count:
            raise ValueError(
                f"{count - self._indexed} entries of {self.path} are not in its index; build it "
                "(store.build(), memwrap store index) before opening it with mmap=True."
            )
        if not self.mmap and (self._indexed < count or self._outgrown(count)):
            self._grow(count)

    def _searched(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = faiss_module()
        removed, index = self._shards.removed, self._index
        kept = None
        with self._busy:
            on_gpu = self.gpu.of(index, self._indexed, k + len(removed), self.effort)
            if on_gpu is not None:  # which cannot leave entries out
                return sifted(on_gpu, queries, k, self.metric, removed)
            if removed:
                if self._selector is None or self._selector[0] != len(removed):
                    batch = faiss.IDSelectorBatch(np.fromiter(removed, np.int64))
                    self._selector = len(removed), faiss.IDSelectorNot(batch), batch
                kept = self._selector[1]
        options = search_options(index, k, self.effort, kept)
        if options is None:
            return sifted(index, queries, k, self.metric, removed)
        return index.search(queries, k, params=options)

    def entries(self, ids: Tensor | np.ndarray) -> Entries:
        return self._shards.entries(np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids))

    def vectors(self, ids: Sequence[int] | np.ndarray) -> Tensor:
        """Return the vectors `(n, D)` float32 of the entries `ids` `(n,)`, as they are kept."""
        index = np.asarray(ids, np.int64)
        if index.size and (index.min() < 0 or index.max() >= len(self._shards)):
            raise ValueError(f"`ids` must be from 0 to {len(self._shards) - 1}.")
        return torch.from_numpy(self._shards.gather(index).astype(np.float32))

    def remove(self, ids: Iterable[int]) -> int:
        self._locked()
        count = self._shards.remove(ids)
        self._write_header()  # the file of removals must be there from now on
        return count

    def of_document(self, number: int) -> list[int]:
        return self._shards.of_document(number)

    def clear(self) -> None:
        self._write_header(removals=False, cleared=True)  # from here on nothing is in it
        if self.path is not None:
            clear_files(self.path)
        self._shards.clear()
        self._index, self._indexed, self.made_by, self._selector = None, 0, "", None
        self.gpu.drop()
        self.cursor = None
        self._write_header(removals=False)

    @property
    def documents(self) -> Sequence[str]:
        return tuple(self._shards.documents)

    def __len__(self) -> int:
        return len(self._shards) - len(self._shards.removed)

    @property
    def nbytes(self) -> int:
        """Bytes of the index (where it is mapped, on disk), the columns, and what waits."""
        return self._shards.nbytes + self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index as faiss writes it."""
        if self._index is None:
            return 0
        if self.path is not None and (size := written_size(self.path, self._indexed)):
            return size
        faiss = faiss_module()
        if isinstance(self._index, faiss.IndexFlat):
            return self._indexed * self.dim * 4
        return len(faiss.serialize_index(self._index))

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files of the folder."""
        return 0 if self.path is None else sum(f.stat().st_size for f in self.path.iterdir())

    def verify(self) -> None:
        """Read every byte of the files and compare checksums.

        Raises:
            ValueError: names the damaged file.
        """
        self._shards.verify()
        if self.path is not None:
            verify_index(self.path, self._shards, self.metric)

    def save(self, path: str | Path) -> None:
        """Write everything, the index too. A store in memory lies in `path` from then on; one on
        disk is copied there."""
        target = Path(path)
        if self.path is None:
            if holds_files(target):
                raise ValueError(f"{target} is not empty; give another folder.")
            self.path = target
            self._write_header(removals=False)
            self._shards.folder = target
            self._shards.commit()
            self._shards.save_removed()
            if self._index is not None and self._indexed == len(self._shards):
                self._write_index()
            self.build()
            return
        if not self.mmap:
            self.build()
        if target.resolve() != self.path.resolve():
            copy_folder(self.path, target)

    def save_beside(self, new: Path, folder: Path) -> None:
        if self.path is not None and self.path.resolve() == folder.resolve():
            if not self.mmap:
                self.build()
        elif self.path is not None:
            self.save(new)
        else:
            if len(self._shards):
                self._ready()
            twin = copy.copy(self)
            twin._shards = self._shards.copy()
            twin.save(new)
            twin.close()

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> FaissStore:
        """Open a store; `options` as for the class (`mmap=True`, `effort`, `refine`)."""
        settle(Path(path))
        header = checked_header(Path(path), kind=cls.kind)
        return cls(header["dim"], header["metric"], path=path, **options)
