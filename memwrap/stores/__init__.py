"""Vector stores behind one small interface.

`TorchStore` is exact and lies on the model's device; `FaissStore` lies on disk and scales to what
one machine holds; `PgVectorStore` is a PostgreSQL server. `new_store` chooses by size, `open_store`
opens whatever a path or URL names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memwrap.io.reading import inside
from memwrap.io.whole_folders import settle
from memwrap.stores.base import Entries, Neighbours, Store
from memwrap.stores.embedded import FaissStore
from memwrap.stores.exact import FILE, TorchStore
from memwrap.stores.files import HEADER, read_json
from memwrap.stores.urls import is_url

CROSSOVER = {"cpu": 256, "cuda": 1_000_000}
"""From so many entries on `FaissStore` answers one query and a batch of them in less time than
exact search with torch: on a CPU the smallest size that was measured
(`benchmarks/results/stores.json`). The number for GPUs is an estimate that nobody has measured
(`benchmarks/kernels/stores_on_gpu.py` does)."""


def choose_kind(entries: int | None, device: torch.device | str = "cpu") -> str:
    """Choose `"torch"` below the measured crossover, `"faiss"` from there on or for an unknown
    size."""
    limit = CROSSOVER.get(torch.device(device).type, CROSSOVER["cpu"])
    return "torch" if entries is not None and entries < limit else "faiss"


def new_store(
    dim: int,
    metric: str = "l2",
    *,
    path: str | Path | None = None,
    entries: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Store:
    """Make a store of the kind that fits.

    Args:
        dim: width of the vectors.
        metric: `"l2"` or `"ip"`.
        path: a folder, or the URL of a PostgreSQL server. None: in memory.
        entries: how many are expected; None for many.
        device: where queries come from.
        options: for the kind that is chosen.
    """
    if path is not None and is_url(path):
        from memwrap.stores.server import PgVectorStore

        return PgVectorStore(str(path), dim, metric, **options)
    if path is None and choose_kind(entries, device) == "torch":
        return TorchStore(dim, metric, device=device, **options)
    return FaissStore(dim, metric, path=path, **options)


def open_store(path: str | Path, **options: Any) -> Store:
    """Open a store that is there.

    Args:
        path: a folder, or the URL of a PostgreSQL server with its table. A folder that stands for
            a server is refused: only a URL that is given here is connected to.
        options: for the kind that it is (`mmap=True`, `effort=`, `device=`).

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: for a damaged or foreign file.
        ConnectionError: if the server is away.
    """
    if is_url(path):
        from memwrap.stores.server import PgVectorStore

        return PgVectorStore.load(str(path), **options)
    folder = Path(path).expanduser()
    settle(folder)
    if (folder / FILE).is_file():
        return TorchStore.load(folder, **options)
    if (folder / HEADER).is_file():
        if read_json(inside(folder, HEADER)).get("kind") == "pgvector":
            from memwrap.stores.server import PgVectorStore

            return PgVectorStore.load(folder, **options)
        return FaissStore.load(folder, **options)
    raise FileNotFoundError(f"There is no store in {folder}; build one: memwrap store build.")


__all__ = [
    "CROSSOVER",
    "Entries",
    "FaissStore",
    "Neighbours",
    "Store",
    "TorchStore",
    "choose_kind",
    "new_store",
    "open_store",
]
