"""Vector stores: a million vectors through faiss and pgvector, and where faiss overtakes torch.

    python stores.py crossover kinds million [million_islands] [million_islands_graph]

`million` measures torch, faiss and pgvector in one run, one after the other. Each part is put into
`results/stores.json` beside those that are there, with the time at which it began. The server is
started from the package `pgserver`, in a temporary folder. `derive` measures nothing: it writes
anew what follows from the times.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from common import RESULTS, save

from memwrap.evaluation.store_bench import (
    KINDS,
    bench,
    clustered,
    crossover,
    overtakes,
    recall_at,
    timed,
)
from memwrap.ops.neighbours import nearest
from memwrap.stores import FaissStore
from memwrap.stores.indexes import choose_factory

SIZES = (256, 1024, 4096, 16_384, 32_768, 65_536, 131_072)
MIDDLE = (16_384, 32_768, 65_536, 131_072)
MEMORY, WORKERS = "4GB", 1
OPTIONS = (
    f"options=-c%20maintenance_work_mem%3D{MEMORY}"
    f"%20-c%20max_parallel_maintenance_workers%3D{WORKERS}"
)


def with_server(entries: int) -> dict[str, Any]:
    """All stores; pgvector on a server of its own, with memory for the whole index."""
    folder = tempfile.mkdtemp(prefix="memwrap-pg-")
    os.environ.setdefault("XDG_RUNTIME_DIR", folder)
    import pgserver

    server = pgserver.get_server(os.path.join(folder, "data"), cleanup_mode="delete")
    try:
        url = f"{server.get_uri()}&{OPTIONS}"
        found = bench(entries, 128, kinds=KINDS, url=url, say=partial(print, flush=True))
        found["stores"]["pgvector"] |= {
            "maintenance_work_mem": MEMORY, "workers_beside_the_leader": WORKERS,
        }  # fmt: skip
        return found
    finally:
        server.cleanup()


def kinds() -> dict[str, Any]:
    """A graph and lists at middle sizes on both kinds of data, each with its default effort; in
    processor time, which other work hardly disturbs."""
    rows = []
    cpu = partial(timed, clock=time.process_time)
    for entries, apart in itertools.product(MIDDLE, (0.25, 1.0)):
        vectors, asked = clustered(entries, 128, apart=apart), clustered(1000, 128, 1, apart)
        exact = nearest(asked, vectors, 16)[1]
        lists = 2 ** round(math.log2(4 * math.sqrt(entries)))
        for factory in ("Flat", "HNSW32", f"IVF{lists},Flat"):
            store = FaissStore(128, factory=factory)
            store.add(vectors)
            rows.append({
                "entries": entries, "apart": apart, "factory": factory,
                "chosen": factory == choose_factory(entries, 128), "build_cpu_s": cpu(store.build),
                "recall": recall_at(store.search(asked, 16), exact),
                "query_cpu_ms": cpu(store.search, asked, 16) / len(asked) * 1e3,
                "bytes_per_vector": store.nbytes / entries,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return {"dim": 128, "k": 16, "queries": 1000, "rows": rows}


PARTS = {
    "kinds": kinds,
    "crossover": lambda: crossover(SIZES, 128),
    "million": lambda: with_server(1_000_000),
    "million_islands": lambda: bench(1_000_000, 128, kinds=("faiss",), apart=1.0, say=print),
    "million_islands_graph": lambda: bench(
        1_000_000, 128, kinds=("faiss",), apart=1.0, factory="HNSW32", say=print
    ),
}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("crossover", "kinds", "million"):
        measured: dict[str, Any] = {}
        try:
            if name != "derive":
                begun = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
                measured = {name: {"measured": begun, **PARTS[name]()}}
        except ImportError as error:
            print(f"stores: {name!r} is not measured: {error}")
            continue
        path = RESULTS / "stores.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        found = {k: v for k, v in {**before, **measured}.items() if k in PARTS}
        if "crossover" in found:
            found["crossover"]["from_entries"] = overtakes(found["crossover"])
        save("stores", {"goal": "recall@16 >= 0.95; faiss' own time within 5%", **found})


if __name__ == "__main__":
    main()
