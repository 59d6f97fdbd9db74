"""Vector stores measured: recall against exact search, build and query time, bytes a vector."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memwrap.ops.neighbours import nearest
from memwrap.stores import FaissStore, Neighbours, Store, TorchStore
from memwrap.stores.indexes import search_options

KINDS = ("torch", "faiss", "pgvector")
CLUSTERS = 4096
APART = 0.25
ABOUT = (
    f"{CLUSTERS} cluster centres from N(0, apart^2 I); every vector and query is a random centre "
    "plus normal noise whose standard deviation falls as 0.8 / sqrt(i) over the dimensions i = 1, "
    "2, ...: few wide directions and many narrow ones. With apart = 0.25 clusters overlap, with 1 "
    "they are islands"
)


def clustered(count: int, dim: int, seed: int = 0, apart: float = APART) -> Tensor:
    """Draw synthetic vectors `(count, dim)` as `ABOUT` says; the centres are the same for every
    seed."""
    centres = apart * torch.randn(CLUSTERS, dim, generator=torch.Generator().manual_seed(1234))
    widths = 0.8 / torch.arange(1, dim + 1).sqrt()
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty(count, dim)
    for part in result.split(65_536):
        chosen = torch.randint(CLUSTERS, (len(part),), generator=generator)
        noise = torch.randn(len(part), dim, generator=generator)
        part.copy_(centres[chosen] + noise * widths)
    return result


def recall_at(neighbours: Neighbours, exact: Tensor) -> float:
    """Compute the part of the exact neighbours `(Q, k)` that was found."""
    pairs = zip(neighbours.ids.tolist(), exact.tolist(), strict=True)
    return statistics.mean(len(set(got) & set(want)) / len(want) for got, want in pairs)


def timed(
    function: Callable[..., Any], *arguments: Any, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measure the seconds of a call, also of what it left to a GPU."""
    start = clock()
    function(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start


def _measured(
    store: Store, vectors: Tensor, queries: Tensor, k: int, exact: Tensor
) -> dict[str, Any]:
    """Fill a store, build it, and search it."""

    def fill() -> None:
        for part in vectors.split(65_536):
            store.add(part)

    load = timed(fill)
    build = getattr(store, "build", None)
    index = 0.0 if build is None else timed(build)
    neighbours = store.search(queries, k)
    batches = [timed(store.search, q, k) / len(q) for q in queries.split(100)]
    singles = [timed(store.search, queries[i : i + 1], k) for i in range(20)]
    return {
        "load_s": load,
        "index_s": index,
        "query_ms_in_batches_of_100": statistics.median(batches) * 1e3,
        "query_ms_alone": statistics.median(singles) * 1e3,
        f"recall_at_{k}": recall_at(neighbours, exact),
        "bytes_per_vector": store.nbytes / len(store),
    }


def _beside_faiss(store: FaissStore, queries: Tensor, k: int, repeats: int = 15) -> dict[str, Any]:
    """Time the store's search against the same search of its own index, called directly, in
    turn."""
    index, array = store._index, np.ascontiguousarray(queries.numpy())
    options = search_options(index, k, store.effort)
    ask = {} if options is None else {"params": options}
    ratios = []
    for _ in range(repeats):
        direct = timed(lambda: index.search(array, k, **ask))
        ratios.append(timed(store.search, queries, k) / direct)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"store_over_faiss": {"median": middle, "q1": low, "q3": high}}


def _at_effort(store: Store, queries: Tensor, k: int, exact: Tensor) -> dict[str, float]:
    """Recall and time as the store is set now; all queries at once."""
    result = store.search(queries, k)
    spent = timed(store.search, queries, k)
    return {"recall": recall_at(result, exact), "query_ms": spent / len(queries) * 1e3}


def _by_effort(store: FaissStore, queries: Tensor, k: int, exact: Tensor) -> dict[str, Any]:
    """Recall and time at other numbers of candidates."""
    before, by_effort = store.effort, {}
    for effort in (8, 16, 32, 64, 128):
        store.effort = effort
        by_effort[str(effort)] = _at_effort(store, queries, k, exact)
    store.effort = before
    return by_effort


def bench(
    entries: int,
    dim: int,
    k: int = 16,
    queries: int = 1000,
    *,
    kinds: Sequence[str] = ("torch", "faiss"),
    url: str | None = None,
    factory: str | None = None,
    effort: int | None = None,
    apart: float = APART,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure stores on the same synthetic vectors.

    Args:
        entries, dim: vectors.
        k: neighbours.
        queries: how many are asked.
        kinds: of `KINDS`.
        url: of the PostgreSQL server; its table `memwrap_bench` is made and dropped.
        factory, effort: of the faiss store.
        apart: how far the clusters' centres are from each other, see `ABOUT`.
        say: is told what is done.

    Returns:
        A JSON-able dict: what was measured, one entry for each kind.

    Raises:
        ValueError: for an unknown kind, a missing URL, or bad numbers.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"Unknown stores {unknown}; allowed: {', '.join(KINDS)}.")
    if "pgvector" in kinds and url is None:
        raise ValueError("The pgvector store needs `--url postgresql://...`.")
    if min(entries, dim, k, queries) < 1:
        raise ValueError("`entries`, `dim`, `k` and `queries` must be at least 1.")
    say(f"{entries:,} vectors of width {dim}, {queries} queries, {k} neighbours")
    vectors = clustered(entries, dim, apart=apart)
    asked = clustered(queries, dim, seed=1, apart=apart)
    exact = nearest(asked, vectors, k)[1]
    stores: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            if kind == "torch":
                stores[kind] = _measured(TorchStore(dim), vectors, asked, k, exact)
            elif kind == "faiss":
                path = Path(folder) / "store"
                store = FaissStore(dim, path=path, factory=factory, effort=effort)
                stores[kind] = _measured(store, vectors, asked, k, exact)
                stores[kind]["factory"] = store.made_by
                stores[kind]["disk_bytes_per_vector"] = store.disk_bytes / entries
                stores[kind] |= _beside_faiss(store, asked, k)
                stores[kind]["by_effort"] = _by_effort(store, asked, k, exact)
                store.close()
            else:
                stores[kind] = _server(str(url), vectors, asked, k, exact)
        say(line(kind, stores[kind], k))
    about: dict[str, Any] = {
        "entries": entries,
        "dim": dim,
        "k": k,
        "queries": queries,
        "vectors": ABOUT,
    }
    about["apart"] = apart
    return {**about, "stores": stores}


def _server(url: str, vectors: Tensor, queries: Tensor, k: int, exact: Tensor) -> dict[str, Any]:
    from memwrap.stores.server import PgVectorStore

    joined = f"{url}{'&' if '?' in url else '?'}table=memwrap_bench"
    store = PgVectorStore(joined, vectors.shape[1])
    store.drop()
    store = PgVectorStore(joined, vectors.shape[1])
    try:
        figures = _measured(store, vectors, queries, k, exact)
        figures |= {"settings": dict(store.settings), "versions": store.versions}
        efforts = {}
        for effort in (16, 32, 64, 128, 256):
            store.settings["ef_search"] = effort
            efforts[str(effort)] = _at_effort(store, queries, k, exact)
        return {**figures, "by_effort": efforts}
    finally:
        store.drop()
        store.close()


def line(kind: str, got: dict[str, Any], k: int) -> str:
    """Write one line of a table."""
    direct = got.get("store_over_faiss")
    return (
        f"{kind:<10} recall@{k} {got[f'recall_at_{k}']:.3f}   load {got['load_s']:.1f} s   "
        f"index {got['index_s']:.1f} s   query {got['query_ms_in_batches_of_100']:.3f} ms "
        f"(alone {got['query_ms_alone']:.2f} ms)   {got['bytes_per_vector']:.0f} bytes a vector"
        + (f"   {direct['median']:.3f} of faiss's own time" if direct else "")
    )


def crossover(
    sizes: Sequence[int],
    dim: int,
    k: int = 16,
    batch: int = 128,
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Find where an index answers faster than exact search with torch: in processor time on a CPU,
    which other work hardly disturbs, else in time.

    Args:
        sizes: numbers of entries.
        dim: width of the vectors.
        k: neighbours.
        batch: queries of the larger of two batches.
        repeats: of each measurement.
        device: where the torch store lies and queries come from; faiss searches on a GPU where it
            has one.

    Returns:
        For every size and for batches of 1 and `batch` queries the milliseconds of torch, of faiss'
        flat index and of the index that `FaissStore` chooses, and its recall; `from_entries`: the
        smallest measured size from which on the chosen one is faster, see `overtakes`.
    """
    rows = []
    clock = time.process_time if device == "cpu" else time.perf_counter
    for size in sizes:
        vectors, asked = clustered(size, dim), clustered(batch, dim, seed=1).to(device)
        chosen = FaissStore(dim)
        stores: dict[str, Store] = {
            "torch": TorchStore(dim, device=device), "flat": FaissStore(dim, factory="Flat"),
            "chosen": chosen,
        }  # fmt: skip
        row: dict[str, Any] = {"entries": size}
        for name, store in stores.items():
            store.add(vectors)
            row[f"{name}_build_s"] = timed(store.search, asked, k, clock=clock)
        row["index"] = chosen.made_by
        row["recall"] = recall_at(chosen.search(asked, k), stores["torch"].search(asked, k).ids)
        times: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, store in stores.items():
                for count in (1, batch):
                    piece = asked[:count]
                    spent = timed(store.search, piece, k, clock=clock)
                    times.setdefault(f"{name}_ms_{count}", []).append(spent * 1e3)
        rows.append(row | {name: statistics.median(values) for name, values in times.items()})

    result = {"dim": dim, "k": k, "batch": batch, "device": device, "sizes": rows}
    return {**result, "from_entries": overtakes(result)}


def overtakes(result: dict[str, Any]) -> int:
    """Find the smallest size of a `crossover` from which on the chosen index answers one query
    alone and a batch in less time, both together, than torch; 0 where there is none."""

    def spent(row: dict[str, Any], name: str) -> float:
        return row[f"{name}_ms_1"] + row[f"{name}_ms_{result['batch']}"]

    wins = 0
    for row in sorted(result["sizes"], key=lambda row: -row["entries"]):
        if spent(row, "chosen") >= spent(row, "torch"):
            break
        wins = row["entries"]
    return wins
