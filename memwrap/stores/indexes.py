"""Kinds of faiss index: which one for how many vectors, and how each is asked."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch

FLAT_MOST, GRAPH_MOST, LISTS_MOST = 32_767, 200_000, 4_000_000
"""Up to so many entries a flat index, up to so many a graph, up to so many inverted lists of
vectors, then of codes."""


def faiss_module() -> Any:
    """Import faiss when it is first needed, with torch's number of threads.

    Raises:
        ImportError: says how to install it.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "This store needs faiss: pip install 'memwrap[stores]' (or faiss-gpu on a GPU)."
        ) from error
    # Two OpenMP runtimes in one process crash on macOS unless one of them keeps to one thread.
    faiss.omp_set_num_threads(1 if sys.platform == "darwin" else torch.get_num_threads())
    return faiss


def measure_of(metric: str) -> Any:
    """Name a metric as faiss does."""
    faiss = faiss_module()
    return faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT


def choose_factory(count: int, dim: int, graph: bool = True) -> str:
    """Return the kind of index for `count` vectors, as a faiss factory string.

    Exact up to `FLAT_MOST`; a graph of the vectors (HNSW) up to `GRAPH_MOST`, where lists need
    many more looked into for the same recall; inverted lists of whole vectors up to `LISTS_MOST`,
    since a graph takes long to build and in large groups of nearly equal entries, as in text that
    repeats itself, its links stay inside them; beyond, lists that are found through a graph and
    hold product codes, whose candidates are scored anew from the vectors on disk. Measured in
    `benchmarks/results/stores.json`.

    Args:
        count: vectors.
        dim: their width.
        graph: whether a graph can be searched; a GPU looks at all of so few vectors instead.
    """
    if count <= (FLAT_MOST if graph else GRAPH_MOST):
        return "Flat"
    if count <= GRAPH_MOST:
        return "HNSW32"
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    if count <= LISTS_MOST:
        return f"IVF{lists},Flat"
    codes = max(m for m in range(1, min(dim, 64) + 1) if dim % m == 0)
    return f"IVF{lists}_HNSW32,PQ{codes}"


def search_options(index: Any, k: int, effort: int | None, selector: Any = None) -> Any:
    """Make faiss' parameters of a search.

    Args:
        index: any index.
        k: neighbours.
        effort: see `FaissStore`.
        selector: faiss' selector of the entries that may be found; None for all.

    Returns:
        None where the kind of index takes no parameters, or needs none.
    """
    faiss = faiss_module()
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_options(faiss.downcast_index(index.index), k, effort, selector)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    options: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(effort or 128, 2 * k), **options)
    if isinstance(index, faiss.IndexIVF):
        probes = min(effort or 32, index.nlist)
        if isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSW):
            options["quantizer_params"] = faiss.SearchParametersHNSW(efSearch=2 * probes)
        codes = isinstance(index, faiss.IndexIVFPQ)
        kind = faiss.IVFPQSearchParameters if codes else faiss.SearchParametersIVF
        return kind(nprobe=probes, **options)
    if options and isinstance(index, faiss.IndexFlat):
        return faiss.SearchParameters(**options)
    return None


def sifted(
    index: Any, queries: np.ndarray, k: int, metric: str, removed: Set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Search by an index that cannot leave entries out: it is asked for more, and those
    that were removed are dropped.

    Args:
        index: any index.
        queries: `(Q, D)`.
        k: neighbours.
        metric: `"l2"` or `"ip"`.
        removed: numbers of entries.

    Returns:
        Scores and numbers `(Q, k)`, -1 where there are fewer.
    """
    if not removed:
        return index.search(queries, k)
    scores, ids = index.search(queries, max(k, min(index.ntotal, k + len(removed))))
    gone = np.isin(ids, np.fromiter(removed, np.int64)) | (ids < 0)
    order = np.argsort(gone, axis=1, kind="stable")[:, :k]
    scores = np.where(gone, np.float32(np.inf if metric == "l2" else -np.inf), scores)
    ids = np.where(gone, -1, ids)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def rescored(
    queries: np.ndarray,
    ids: np.ndarray,
    k: int,
    metric: str,
    gather: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Score the candidates of a lossy index anew from the vectors kept.

    Args:
        queries: `(Q, D)`.
        ids: `(Q, n)` candidates, -1 for none.
        k: neighbours wanted.
        metric: `"l2"` or `"ip"`.
        gather: gives the vectors `(m, D)` of numbers `(m,)`.

    Returns:
        Scores and numbers `(Q, k)`, best first.
    """
    flat = np.unique(ids[ids >= 0])
    table = gather(flat).astype(np.float32)
    rows = np.searchsorted(flat, np.maximum(ids, flat[0] if len(flat) else 0))
    l2 = metric == "l2"
    scores = np.empty(ids.shape, np.float32)
    for i in range(0, len(queries), 64):
        near = table[rows[i : i + 64]]
        q = queries[i : i + 64, None]
        scores[i : i + 64] = ((near - q) ** 2).sum(-1) if l2 else (near * q).sum(-1)
    scores = np.where(ids < 0, np.float32(np.inf if l2 else -np.inf), scores)
    order = np.argsort(scores if l2 else -scores, 1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
