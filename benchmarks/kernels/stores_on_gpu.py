"""Vector stores on a GPU: faiss' copy there finds what its CPU index finds; torch beside it.

python benchmarks/kernels/stores_on_gpu.py [--quick]

Writes `results/stores_GPU.json`. With faiss-cpu only the torch store and the crossover are measured
on the GPU. `on_gpu.py` runs it too.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import save

from memwrap.evaluation.store_bench import clustered, crossover, recall_at
from memwrap.ops.neighbours import nearest
from memwrap.stores import FaissStore, Store, TorchStore
from memwrap.stores.indexes import faiss_module

DIM, K, QUERIES = 128, 16, 1000
SIZES = (1024, 16_384, 131_072, 1_048_576)
CHECKED = (
    "Flat", "IVF256,Flat", "IVF256,SQ8", "IVF256,PQ32", "IVF256_HNSW32,PQ64", "OPQ16,IVF64,PQ16",
)  # fmt: skip


def agreement(factory: str) -> dict[str, float]:
    """The part of the CPU's neighbours that a GPU finds, before and after entries were removed."""
    vectors, asked = clustered(40_000, DIM), clustered(200, DIM, seed=1)
    found: dict[str, float] = {}
    stores = [FaissStore(DIM, factory=factory, device=device) for device in ("cuda", "cpu")]
    for store in stores:
        store.add(vectors)
    for name, gone in (("all", 0), ("after 500 were removed", 500)):
        for store in stores:
            store.remove(range(gone))
        there, here = (store.search(asked, K) for store in stores)
        found[name] = recall_at(there, here.ids)
        if found[name] < 0.97:  # equal distances and float16 tables change places
            raise SystemExit(f"{factory}: a GPU finds {found[name]:.3f} of what the CPU finds.")
    return found


def search_ms(store: Store, asked: Tensor) -> float:
    """Median milliseconds of a query in a batch of all."""
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        store.search(asked, K)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(asked) * 1e3)
    return statistics.median(times[1:])


def timed(entries: int, devices: tuple[str, ...]) -> dict[str, Any]:
    """One size: torch on the GPU, with the most memory of its search, and faiss where it can be."""
    vectors, asked = clustered(entries, DIM), clustered(QUERIES, DIM, seed=1).cuda()
    result: dict[str, Any] = {}
    torch_store = TorchStore(DIM, device="cuda")
    torch_store.add(vectors)
    exact = nearest(asked, torch_store.vectors[0, :entries], K)[1].cpu()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result["torch"] = {
        "query_ms": search_ms(torch_store, asked),
        "bytes_of_a_search": torch.cuda.max_memory_allocated() - before,
        "bytes_of_all_scores": 4 * QUERIES * entries,
    }
    for device in devices:
        store = FaissStore(DIM, device=device)
        store.add(vectors)
        found = store.search(asked, K)
        result[f"faiss on {device}"] = {
            "index": store.made_by, "recall": recall_at(found, exact),
            "query_ms": search_ms(store, asked),
        }  # fmt: skip
    return result


def main() -> None:
    if not torch.cuda.is_available():
        print("benchmarks/kernels: no GPU was found, so stores are not measured on one.")
        return
    quick = "--quick" in sys.argv
    try:
        has_gpus = hasattr(faiss_module(), "StandardGpuResources")
    except ImportError as error:
        print(f"benchmarks/kernels: stores are not measured: {error}")
        return
    sizes = SIZES[:2] if quick else SIZES
    result: dict[str, Any] = {"dim": DIM, "k": K, "queries": QUERIES, "faiss_has_gpus": has_gpus}
    if has_gpus:
        result["of_the_cpus_neighbours"] = {factory: agreement(factory) for factory in CHECKED}
    devices = ("cpu", "cuda") if has_gpus else ("cpu",)
    result["sizes"] = {str(size): timed(size, devices) for size in sizes}
    result["crossover"] = crossover(sizes, DIM, device="cuda")
    gpu = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_")
    save(f"stores_{gpu}", result)


if __name__ == "__main__":
    main()
