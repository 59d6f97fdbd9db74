"""Vector stores: a million vectors through faiss and pgvector, and where faiss overtakes torch.

    python stores.py crossover million server [million_server]

Each part is put into `results/stores.json` beside those that are there. The server is started from
the package `pgserver`, in a temporary folder.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
from common import RESULTS, save

from memwrap.evaluation.stores import bench, crossover

SIZES = (1024, 4096, 16_384, 65_536, 131_072)
MEMORY = "options=-c%20maintenance_work_mem%3D2GB%20-c%20max_parallel_maintenance_workers%3D0"


def on_server(entries: int) -> dict[str, Any]:
    """pgvector on a server of its own, with memory for the index and no parallel workers."""
    folder = tempfile.mkdtemp(prefix="memwrap-pg-")
    os.environ.setdefault("XDG_RUNTIME_DIR", folder)
    import pgserver

    server = pgserver.get_server(os.path.join(folder, "data"), cleanup_mode="delete")
    try:
        url = f"{server.get_uri()}&{MEMORY}"
        found = bench(entries, 128, kinds=("pgvector",), url=url, say=print)
        return {**found, "maintenance_work_mem": "2GB", "parallel_workers": 0}
    finally:
        server.cleanup()


PARTS = {
    "crossover": lambda: crossover(SIZES, 128),
    "million": lambda: bench(1_000_000, 128, kinds=("torch", "faiss"), say=print),
    "million_islands": lambda: bench(1_000_000, 128, kinds=("faiss",), apart=1.0, say=print),
    "million_islands_graph": lambda: bench(
        1_000_000, 128, kinds=("faiss",), apart=1.0, factory="HNSW32", say=print
    ),
    "server": lambda: on_server(100_000),
    "million_server": lambda: on_server(1_000_000),
}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("crossover", "million", "server"):
        result = PARTS[name]()
        path = RESULTS / "stores.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        kept = {k: v for k, v in before.items() if k in PARTS}
        save(
            "stores", {"goal": "recall@16 >= 0.95; faiss' own time within 5%", **kept, name: result}
        )


if __name__ == "__main__":
    main()
