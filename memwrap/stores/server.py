"""A store on a PostgreSQL server with pgvector: for what outgrows one machine's memory or disk.

Everything is said by a URL, `postgresql://user@host:5432/database?table=notes&ef_search=100`; what
memwrap does not know of it goes to libpq. Passwords come from the URL, PGPASSWORD or ~/.pgpass and
are never written to a file or into an error.
"""

from __future__ import annotations

import json
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from torch import Tensor

from memwrap.io.reading import inside
from memwrap.stores import copying
from memwrap.stores.base import (
    Entries,
    Neighbours,
    Store,
    check_k,
    check_names,
    nothing_found,
    numbers_of,
)
from memwrap.stores.files import HEADER, read_json, write_json
from memwrap.stores.urls import hidden, is_url, parts_of, without_password

Result = TypeVar("Result")

_OPERATORS = {"l2": "<->", "ip": "<#>"}
_CLASSES = {"l2": "vector_l2_ops", "ip": "vector_ip_ops"}
_MOST_WIDTH = 2000  # what pgvector's HNSW index takes


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise ImportError(
            "This store needs psycopg: pip install 'memwrap[pgvector]' (psycopg[binary])."
        ) from error
    return psycopg


class PgVectorStore(Store):
    """Vectors in a table of a PostgreSQL server, searched through pgvector's HNSW index.

    Args:
        url: `postgresql://user@host/database`, with the parameters `table` (default
            `memwrap_store`), `m`, `ef_construction` (of the index) and `ef_search` (candidates of a
            search; at least k are looked at).
        dim: width of the vectors, at most 2000.
        metric: `"l2"` or `"ip"`.
        batch: queries sent at once.

    Raises:
        ImportError: without psycopg.
        ConnectionError: if the server is away, or goes away and does not come back at once.
        ValueError: for a bad URL, a table of another width, or a server without pgvector.
    """

    kind = "pgvector"

    def __init__(self, url: str, dim: int, metric: str = "l2", *, batch: int = 256) -> None:
        super().__init__(dim, metric)
        if dim > _MOST_WIDTH:
            raise ValueError(f"`dim` is {dim}; pgvector's HNSW index takes at most {_MOST_WIDTH}.")
        self.url, self.table, self.settings = parts_of(url)
        self.batch = batch
        self._connection: Any = None
        self._documents: list[str] = []
        self._doubtful: tuple[int, int] | None = None  # an add of which nobody knows
        self._retrying(self._prepare)

    # Connection

    @property
    def where(self) -> str:
        """The server and table, without a password."""
        parts = urlsplit(self.url)
        user = f"{parts.username}@" if parts.username else ""
        host = parts.hostname or dict(parse_qsl(parts.query)).get("host", "local socket")
        port = f":{parts.port}" if parts.port else ""
        return f"{user}{host}{port}{parts.path}, table {self.table}"

    def _connected(self) -> Any:
        if self._connection is None or self._connection.closed:
            psycopg = _psycopg()
            try:
                self._connection = psycopg.connect(self.url, autocommit=True, connect_timeout=10)
            except psycopg.OperationalError as error:
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                raise ConnectionError(
                    f"No PostgreSQL server answers at {self.where}: {hidden(reason, self.url)}. "
                    "Is it running, and is the URL right?"
                ) from None
            weakref.finalize(self, self._connection.close)
        return self._connection

    def _retrying(self, function: Callable[[Any], Result]) -> Result:
        """Run a whole unit of work; once more on a new connection if the old one broke. The units
        are such that a second run changes nothing that the first had finished."""
        with self._busy:  # one connection has one transaction at a time
            return self._run(function)

    def _run(self, function: Callable[[Any], Result]) -> Result:
        psycopg = _psycopg()
        try:
            return function(self._connected())
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            if self._connection is not None and not self._connection.closed:
                raise ValueError(f"The server refuses ({self.where}): {error}") from error
            self._connection = None
        except psycopg.Error as error:
            raise ValueError(f"The server refuses ({self.where}): {error}") from error
        try:
            return function(self._connected())
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise ConnectionError(f"The server at {self.where} broke off: {error}") from error

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_connection": None}

    # Tables

    def _prepare(self, connection: Any) -> None:
        psycopg, table = _psycopg(), self.table
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except psycopg.errors.DatabaseError as error:
            if isinstance(error, psycopg.OperationalError):
                raise
            raise ValueError(
                f"The server at {self.where} offers no pgvector ({error}); install the extension."
            ) from error
        with connection.transaction():
            # Two processes that begin at once would both see no table.
            connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (table,))
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table} (id bigint PRIMARY KEY,"
                " value integer NOT NULL, document integer NOT NULL,"
                " first integer NOT NULL, last integer NOT NULL,"
                f" embedding vector({self.dim}) NOT NULL)"
            )
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table}_documents (number integer PRIMARY KEY,"
                " name text NOT NULL UNIQUE)"
            )
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table}_about (one boolean PRIMARY KEY, added bigint"
                " NOT NULL, cursor text NOT NULL, notes text NOT NULL, metric text NOT NULL)"
            )
            connection.execute(
                f"INSERT INTO {table}_about VALUES (true, 0, 'null', '{{}}', %s)"
                " ON CONFLICT DO NOTHING",
                (self.metric,),
            )
        self._learn(connection)

    def _learn(self, connection: Any) -> None:
        """Read what the tables say, checked against what was asked for."""
        width = connection.execute(
            "SELECT atttypmod FROM pg_attribute WHERE attrelid = %s::regclass"
            " AND attname = 'embedding'",
            (self.table,),
        ).fetchone()
        cursor, notes, metric = connection.execute(
            f"SELECT cursor, notes, metric FROM {self.table}_about"
        ).fetchone()
        if width is None or width[0] != self.dim or metric != self.metric:
            raise ValueError(
                f"The table at {self.where} holds vectors of width {width and width[0]} with the "
                f"metric {metric!r}, not {self.dim} and {self.metric!r}."
            )
        self.cursor, self.notes = json.loads(cursor), json.loads(notes)
        self._documents = [
            name
            for (name,) in connection.execute(
                f"SELECT name FROM {self.table}_documents ORDER BY number"
            )
        ]

    @property
    def documents(self) -> Sequence[str]:
        return tuple(self._documents)

    def note(self, values: dict[str, Any]) -> None:
        super().note(values)
        text = json.dumps(self.notes)
        self._retrying(lambda c: c.execute(f"UPDATE {self.table}_about SET notes = %s", (text,)))

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
        """See `Store.add`: one transaction, loaded with COPY."""
        check_names(document, cursor)
        block = self._checked(vectors)
        if block.dim() != 2:
            raise ValueError(f"`vectors` has shape {tuple(block.shape)}; it needs (N, {self.dim}).")
        number = None
        if document is not None:
            known = document in self._documents
            number = self._documents.index(document) if known else len(self._documents)
        entries = Entries.make(len(block), values, number, spans)
        entries.check_range()
        array = block.cpu().numpy()
        first = self._retrying(lambda c: c.execute(self._added).fetchone()[0])
        same = _digest(array, entries)
        if self._doubtful == (same, first - len(array)):  # it got through, only its answer was lost
            first -= len(array)

        def load(connection: Any) -> None:
            with connection.transaction():
                row = connection.execute(f"{self._added} FOR UPDATE").fetchone()
                if row[0] == first + len(array) and len(array):
                    return  # the first try got through, only its answer was lost
                if row[0] != first:
                    raise ValueError(f"Another process is writing the store at {self.where}.")
                if number is not None and number == len(self._documents):
                    connection.execute(
                        f"INSERT INTO {self.table}_documents VALUES (%s, %s)", (number, document)
                    )
                with connection.cursor().copy(
                    f"COPY {self.table} FROM STDIN WITH (FORMAT binary)"
                ) as copy:
                    copy.write(copying.START)
                    for start in range(0, len(array), 4096):
                        piece = slice(start, start + 4096)
                        copy.write(copying.rows(first + start, array[piece], entries[piece]))
                    copy.write(copying.END)
                connection.execute(
                    f"UPDATE {self.table}_about SET added = added + %s,"
                    " cursor = CASE WHEN %s = 'null' THEN cursor ELSE %s END",
                    (len(array), json.dumps(cursor), json.dumps(cursor)),
                )

        self._doubtful = same, first
        try:
            self._retrying(load)
        except ValueError:  # it says that nothing was added
            self._doubtful = None
            raise
        self._doubtful = None
        if number is not None and number == len(self._documents):
            self._documents.append(document)  # type: ignore[arg-type]
        self.cursor = cursor if cursor is not None else self.cursor
        return range(first, first + len(array))

    @property
    def _added(self) -> str:
        return f"SELECT added FROM {self.table}_about"

    def build(self, *, progress: bool = False) -> None:
        """Make the HNSW index if it is not there (later entries enter it as they come).

        For a large table set `maintenance_work_mem` of the server to what the index takes.
        """
        m, ef = self.settings["m"], self.settings["ef_construction"]
        self._retrying(
            lambda c: c.execute(
                f"CREATE INDEX IF NOT EXISTS {self.table}_hnsw ON {self.table} USING hnsw"
                f" (embedding {_CLASSES[self.metric]}) WITH (m = {m}, ef_construction = {ef})"
            )
        )

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """See `Store.search`: exact without an index, approximate after `build`."""
        check_k(k)
        q = self._checked(queries, "queries")
        flat = q.reshape(-1, self.dim).cpu().numpy()
        empty = nothing_found(torch.empty(len(flat), self.dim), k, self.metric)
        scores, ids = empty.scores.numpy(), empty.ids.numpy()
        for start in range(0, len(flat), self.batch):
            piece = flat[start : start + self.batch]
            rows = self._retrying(partial(self._asked, queries=piece, k=k))
            if rows:
                hits = np.array(rows, np.float64)
                place = hits[:, 0].astype(np.int64) - 1
                rank = np.arange(len(place)) - np.searchsorted(place, place)
                ids[start + place, rank] = hits[:, 1].astype(np.int64)
                scores[start + place, rank] = self._score(hits[:, 2])
        shape = (*queries.shape[:-1], k)
        return Neighbours(
            torch.from_numpy(scores).to(queries.device).view(shape),
            torch.from_numpy(ids).to(queries.device).view(shape),
        )

    def _score(self, distance: np.ndarray) -> np.ndarray:
        return distance**2 if self.metric == "l2" else -distance

    def _asked(self, connection: Any, queries: np.ndarray, k: int) -> list[tuple]:
        """Ask for the neighbours of a batch, best first: `(query from 1, id, distance)`."""
        operator = _OPERATORS[self.metric]
        texts = ["[" + ",".join(map(repr, q)) + "]" for q in queries.tolist()]
        with connection.transaction():
            connection.execute(f"SET LOCAL hnsw.ef_search = {max(k, self.settings['ef_search'])}")
            return connection.execute(
                "SELECT q.n, near.id, near.d FROM unnest(%s::vector[]) WITH ORDINALITY AS q(v, n)"
                f" CROSS JOIN LATERAL (SELECT id, embedding {operator} q.v AS d FROM {self.table}"
                f" ORDER BY embedding {operator} q.v LIMIT {k}) AS near ORDER BY q.n, near.d",
                (texts,),
            ).fetchall()

    def entries(self, ids: Tensor | np.ndarray) -> Entries:
        index = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        wanted = np.unique(index)
        rows = self._retrying(
            lambda c: c.execute(
                f"SELECT id, value, document, first, last FROM {self.table} WHERE id = ANY(%s)"
                " ORDER BY id",
                (wanted.tolist(),),
            ).fetchall()
        )
        table = np.array(rows, np.int64).reshape(-1, 5)
        table = np.concatenate([table, np.full((1, 5), -1)])
        place = np.searchsorted(table[:-1, 0], index)
        place = np.where(table[place, 0] == index, place, len(table) - 1)
        return Entries(*[table[place, column] for column in range(1, 5)])

    def remove(self, ids: Iterable[int]) -> int:
        wanted = numbers_of(ids)
        return self._retrying(
            lambda c: c.execute(f"DELETE FROM {self.table} WHERE id = ANY(%s)", (wanted,)).rowcount
        )

    def of_document(self, number: int) -> list[int]:
        rows = self._retrying(
            lambda c: c.execute(
                f"SELECT id FROM {self.table} WHERE document = %s ORDER BY id", (number,)
            ).fetchall()
        )
        return [row[0] for row in rows]

    def clear(self) -> None:
        def empty(connection: Any) -> None:
            with connection.transaction():
                connection.execute(f"TRUNCATE {self.table}, {self.table}_documents")
                connection.execute(f"UPDATE {self.table}_about SET added = 0, cursor = 'null'")

        self._retrying(empty)
        self._documents, self.cursor = [], None

    def drop(self) -> None:
        """Delete the store's tables from the server."""
        names = ", ".join(self.table + end for end in ("", "_documents", "_about"))
        self._retrying(lambda c: c.execute(f"DROP TABLE IF EXISTS {names}"))

    def __len__(self) -> int:
        count = self._retrying(lambda c: c.execute(f"SELECT count(*) FROM {self.table}").fetchone())
        return count[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the table and its indexes on the server."""
        size = self._retrying(
            lambda c: c.execute(
                "SELECT pg_total_relation_size(%s::regclass)", (self.table,)
            ).fetchone()
        )
        return size[0]

    @property
    def versions(self) -> dict[str, str]:
        """Of the server and of pgvector."""
        rows = self._retrying(
            lambda c: c.execute(
                "SELECT current_setting('server_version'), extversion FROM pg_extension"
                " WHERE extname = 'vector'"
            ).fetchone()
        )
        return {"postgresql": rows[0], "pgvector": rows[1]}

    def save(self, path: str | Path) -> None:
        """Write where the server is (without a password) into a folder; the vectors stay there."""
        write_json(
            Path(path) / HEADER,
            {"kind": self.kind, "dim": self.dim, "metric": self.metric, "url": self._public()},
        )

    def _public(self) -> str:
        return without_password(self.url, table=self.table, **self.settings)

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> PgVectorStore:
        """Open what a URL names.

        Raises:
            FileNotFoundError: if the server has no such table.
            ConnectionError, ValueError: as the class; a folder of `save` is refused, for somebody
                else may have written it.
        """
        if not is_url(path):
            url = str(read_json(inside(Path(path), HEADER)).get("url"))[:200]
            raise ValueError(
                f"{Path(path) / HEADER} names the server {without_password(url)}; memwrap connects "
                "to none that a file names. If you trust it, give this URL instead of the folder."
            )
        text = str(path)
        url, table, _ = parts_of(text)
        probe = cls.__new__(cls)
        probe.url, probe.table, probe._connection = url, table, None
        description = probe._retrying(lambda c: _described(c, table))
        probe.close()
        if description is None:
            raise FileNotFoundError(f"There is no store at {probe.where}; build one first.")
        return cls(text, description[0], description[1], **options)


def _digest(array: np.ndarray, entries: Entries) -> int:
    """Hash one `add`, to tell it from another."""
    columns = (np.ascontiguousarray(getattr(entries, name)) for name in Entries.FIELDS)
    total = 0
    for part in (np.ascontiguousarray(array), *columns):
        total = zlib.crc32(part.view(np.uint8).data, total) if part.size else total
    return total


def _described(connection: Any, table: str) -> tuple[int, str] | None:
    """Read width and metric of a store's table, or None."""
    if connection.execute("SELECT to_regclass(%s)", (f"{table}_about",)).fetchone()[0] is None:
        return None
    width = connection.execute(
        "SELECT atttypmod FROM pg_attribute WHERE attrelid = %s::regclass"
        " AND attname = 'embedding'",
        (table,),
    ).fetchone()[0]
    return width, connection.execute(f"SELECT metric FROM {table}_about").fetchone()[0]
