"""What every vector store is: the calls, what a search returns, and what stands beside a vector."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor

METRICS = ("l2", "ip")
NONE = -1
"""Stands for a value, a document or a token place that was not given."""
_MOST_NEIGHBOURS = 2**20
_LARGEST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Neighbours:
    """The results of a search, best first.

    Attributes:
        scores: `(..., Q, k)` float32: squared Euclidean distances, ascending (`"l2"`), or inner
            products, descending (`"ip"`). Infinite where there are fewer than `k` entries.
        ids: `(..., Q, k)` int64 numbers of the entries; -1 where there are fewer than `k`.
    """

    scores: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Entries:
    """The columns beside vectors, one place for each vector (-1: not given).

    Attributes:
        values: an integer of the user's (kNN-LM: the next token).
        documents: number of the document, an index into `Store.documents`.
        starts, ends: the tokens of that document, `[start, end)`.
    """

    values: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    FIELDS = ("values", "documents", "starts", "ends")

    @classmethod
    def make(
        cls,
        count: int,
        values: Any = None,
        documents: Any = None,
        spans: Any = None,
    ) -> Entries:
        """Make columns of `count` entries.

        Args:
            values: `(count,)` integers, or None.
            documents: `(count,)` numbers, one number for all, or None.
            spans: `(count, 2)` integers `[start, end)`, or None.

        Raises:
            ValueError: for another length.
        """
        columns = [_column(values, count, "values"), _column(documents, count, "documents")]
        if spans is None:
            columns += [np.full(count, NONE, np.int64)] * 2
        else:
            pairs = _whole(spans, "spans")
            if pairs.shape != (count, 2):
                raise ValueError(f"`spans` has shape {pairs.shape}; it needs ({count}, 2).")
            columns += [pairs[:, 0], pairs[:, 1]]
        made = cls(*columns)
        if not made.has_order():
            raise ValueError("`spans` must be [start, end) with start <= end.")
        made.check_range()
        return made

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Entries:
        return Entries(*[getattr(self, name)[index] for name in self.FIELDS])

    @staticmethod
    def cat(parts: Iterable[Entries]) -> Entries:
        """Join columns."""
        parts = [Entries.make(0), *parts]
        return Entries(
            *[np.concatenate([getattr(p, name) for p in parts]) for name in Entries.FIELDS]
        )

    def has_order(self) -> bool:
        """Tell whether no span ends before it starts."""
        return not bool((self.ends < self.starts).any())

    def check_range(self) -> None:
        """Refuse numbers that the 32 bits they are kept in do not hold.

        Raises:
            ValueError: names the column.
        """
        for name in self.FIELDS:
            column = getattr(self, name)
            if column.size and (column.max() > _LARGEST or column.min() < NONE):
                raise ValueError(f"`{name}` must be from {NONE} to {_LARGEST}.")

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.FIELDS)


def _column(given: Any, count: int, name: str) -> np.ndarray:
    if given is None:
        return np.full(count, NONE, np.int64)
    column = _whole(given, name)
    if column.ndim == 0:
        column = np.full(count, column)
    if column.shape != (count,):
        raise ValueError(f"`{name}` has shape {column.shape}; it needs ({count},).")
    return column


def _whole(given: Any, name: str) -> np.ndarray:
    """Check integers that a 64-bit number holds; nothing is rounded."""
    try:
        array = np.asarray(given)
        if array.size == 0 or array.dtype.kind in "iub":
            return array.astype(np.int64)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"`{name}` must be whole numbers; got {str(given)[:60]}.")


def numbers_of(ids: Iterable[int]) -> list[int]:
    """List the numbers of entries, whole ones.

    Raises:
        ValueError: for others; nothing is rounded.
    """
    numbers: list[int] = _whole(list(ids), "ids").tolist()
    return numbers


class Store(ABC):
    """Vectors that can be searched. Entries are numbered in the order in which they came.

    Attributes:
        dim: width D of the vectors.
        metric: `"l2"` or `"ip"`.
        identity: tells the store from others; copies and what is added later keep it.
    """

    kind: str = ""
    _busy: Any = RLock()
    """Held while a search, of which several may run at once, changes what the store holds."""

    def __init__(self, dim: int, metric: str = "l2") -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"`dim` is {dim!r}; it must be an integer of at least 1.")
        if metric not in METRICS:
            raise ValueError(f"`metric` is {metric!r}; allowed: 'l2' (squared distance), 'ip'.")
        self.dim = dim
        self.metric = metric
        self._busy = RLock()
        self.notes: dict[str, Any] = {}
        """Saved with the store: what its vectors are, tuned settings."""
        self.cursor: Any = None
        """The `cursor` of the last `add` that is safe."""
        self.identity = uuid.uuid4().hex

    @abstractmethod
    def add(
        self,
        vectors: Tensor,
        *,
        values: Any = None,
        document: str | None = None,
        spans: Any = None,
        cursor: Any = None,
    ) -> range:
        """Add entries, all of them or none.

        Args:
            vectors: `(N, D)`.
            values: `(N,)` integers to keep beside them.
            document: name of the document they come from.
            spans: `(N, 2)` tokens `[start, end)` of the document.
            cursor: anything JSON can hold: where to go on after these entries. It becomes
                `cursor` at the moment in which they are safe from a crash.

        Returns:
            The numbers of the new entries.

        Raises:
            ValueError: for another width, or numbers that are not finite.
        """

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> Neighbours:
        """Return the `k` nearest entries of each of `(Q, D)` queries, on the queries' device."""

    @abstractmethod
    def entries(self, ids: Tensor | np.ndarray) -> Entries:
        """Give what stands beside the entries of these numbers (any shape; -1 gives -1)."""

    @abstractmethod
    def remove(self, ids: Iterable[int]) -> int:
        """Remove entries; returns how many were there. Other entries keep their numbers."""

    @abstractmethod
    def clear(self) -> None:
        """Remove everything."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the store to a folder."""

    def save_beside(self, new: Path, folder: Path) -> None:
        """Write a copy into `new`, a folder that will become `folder`; nothing where the store
        lies there already. The store itself stays where it is."""
        self.save(new)

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Store:
        """Read a store.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: for a damaged or foreign file; names it.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Count the entries that a search may find."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held in memory or, by a server, on its disk."""

    @property
    @abstractmethod
    def documents(self) -> Sequence[str]:
        """Names of the documents, in the order in which they came."""

    def commit(self) -> None:  # noqa: B027
        """Make everything that was added safe from a crash, where the store is on disk."""

    def note(self, values: dict[str, Any]) -> None:
        """Put JSON-able facts into `notes`, and save them where the store is on disk."""
        self.notes = {**self.notes, **values}

    def remove_document(self, name: str) -> int:
        """Remove the entries of a document; returns how many there were.

        Raises:
            ValueError: if the store has no such document.
        """
        if name not in self.documents:
            raise ValueError(f"The store has no document {name!r}.")
        return self.remove(self.of_document(list(self.documents).index(name)))

    @abstractmethod
    def of_document(self, number: int) -> list[int]:
        """Return the entries of a document."""

    # Stores are shared: a copied model searches the same one.

    def __deepcopy__(self, memo: dict) -> Store:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_busy"}

    def _checked(self, vectors: Tensor, name: str = "vectors") -> Tensor:
        """Check vectors: float32 of the right width.

        Raises:
            ValueError: says what is wrong.
        """
        try:
            vectors = torch.as_tensor(vectors)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`{name}` is {type(vectors).__name__}; give a tensor.") from error
        if vectors.dim() < 2 or vectors.shape[-1] != self.dim:
            raise ValueError(
                f"`{name}` has shape {tuple(vectors.shape)}; the store's vectors are "
                f"(N, {self.dim})."
            )
        if not vectors.is_floating_point():
            raise ValueError(f"`{name}` is {vectors.dtype}; it must be floating point.")
        vectors = vectors.detach().float()
        if not bool(vectors.isfinite().all()):
            raise ValueError(f"`{name}` holds numbers that are not finite; nothing was changed.")
        return vectors


def check_names(document: Any, cursor: Any) -> None:
    """Refuse a document's name or a cursor that cannot be written down."""
    if document is not None and not isinstance(document, str):
        raise ValueError(f"`document` is {type(document).__name__}; it must be text.")
    try:
        json.dumps(cursor)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`cursor` cannot be written as JSON: {error}") from error


def check_k(k: int) -> None:
    """Refuse a number of neighbours below 1, or one for which there is hardly memory."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"`k` is {k!r}; it must be an integer of at least 1.")
    if k > _MOST_NEIGHBOURS:
        raise ValueError(f"`k` is {k}; a search gives {_MOST_NEIGHBOURS:,} neighbours at most.")


def nothing_found(queries: Tensor, k: int, metric: str) -> Neighbours:
    """Return the neighbours in an empty store."""
    shape = (*queries.shape[:-1], k)
    worst = float("inf") if metric == "l2" else float("-inf")
    ids = torch.full(shape, NONE, dtype=torch.long, device=queries.device)
    return Neighbours(torch.full(shape, worst, device=queries.device), ids)
