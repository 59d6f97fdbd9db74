"""Entries in the binary format of PostgreSQL's COPY."""

from __future__ import annotations

import numpy as np

from memwrap.stores.base import Entries

START = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
END = b"\xff\xff"


def rows(first: int, vectors: np.ndarray, entries: Entries) -> bytes:
    """Write rows in the binary format of COPY: counts and lengths before every field,
    big-endian."""
    count, width = vectors.shape
    columns = ("value", "document", "first", "last")
    fields: list[tuple] = [("fields", ">i2"), ("id_length", ">i4"), ("id", ">i8")]
    for name in columns:
        fields += [(f"{name}_length", ">i4"), (name, ">i4")]
    fields += [("length", ">i4"), ("width", ">i2"), ("unused", ">i2"), ("vector", ">f4", width)]
    table = np.zeros(count, np.dtype(fields))
    table["fields"], table["id_length"], table["id"] = 6, 8, np.arange(first, first + count)
    for name, column in zip(columns, Entries.FIELDS, strict=True):
        table[f"{name}_length"], table[name] = 4, getattr(entries, column)
    table["length"], table["width"], table["vector"] = 4 + 4 * width, width, vectors
    return table.tobytes()
