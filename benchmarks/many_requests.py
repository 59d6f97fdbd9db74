"""Many requests by threads on one model in one process: flat memory, and no wrong answer.

    python benchmarks/many_requests.py [--requests 2000] [--threads 4]

Five memories, one model each over one base's weights. Each request continues a state that is shared
by all, reads a text of its own, or generates; every answer is compared with the one that the same
request gave alone. Writes benchmarks/results/many_requests.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import memwrap
from memwrap.state.trees import tree_leaves
from memwrap.testing.families import build
from memwrap.testing.helpers import ids, randomise, tiny

MEMORIES = ("armt", "memorizing", "infllm", "knnlm", "landmark")
RESULT = Path(__file__).parent / "results" / "many_requests.json"
TEXTS = 8


def resident() -> float:
    """MB that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Service:
    """Models that answer requests by number; what each should answer is known."""

    def __init__(self, texts: int = TEXTS) -> None:
        self.texts = texts
        self.models = [randomise(memwrap.wrap(build("llama"), tiny(n))).eval() for n in MEMORIES]
        self.states = [[m.read(ids(1, 21 + n, seed=n)) for n in range(texts)] for m in self.models]
        self.kinds = len(self.models) * texts * 3
        self.wanted = [self.answer(n) for n in range(self.kinds)]

    @torch.no_grad()
    def answer(self, number: int) -> Any:
        number %= self.kinds
        which, rest = divmod(number, self.texts * 3)
        text, kind = divmod(rest, 3)
        model, state = self.models[which], self.states[which][text]
        if kind == 0:
            return model(ids(1, 9, seed=text), cache=state.clone()).logits
        if kind == 1:
            out = model(ids(1, 30 + text, seed=50 + text), use_cache=True)
            trees = [tree_leaves(tree) for tree in out.cache.memories.values()]
            parts = [out.logits, *(leaf for leaves in trees for _, leaf in leaves)]
            return torch.cat([part.double().flatten() for part in parts])
        return model.generate(
            ids(1, 5, seed=text), cache=state, max_new_tokens=10, do_sample=False
        ).tolist()

    def is_right(self, number: int) -> bool:
        got, wanted = self.answer(number), self.wanted[number % self.kinds]
        if isinstance(wanted, torch.Tensor):
            return torch.equal(got, wanted)
        return got == wanted


def run(requests: int, threads: int, texts: int = TEXTS, parts: int = 10) -> dict[str, Any]:
    """Answer requests; memory after each part of them."""
    torch.set_num_threads(1)
    service, wrong, held = Service(texts), 0, []
    order = torch.randperm(requests, generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(threads) as pool:
        for part in range(parts):
            right = pool.map(service.is_right, order[part::parts])
            wrong += sum(not good for good in right)
            gc.collect()
            held.append(resident())
    return {"requests": requests, "threads": threads, "memories": list(MEMORIES), "wrong": wrong,
            "resident_mb": [round(mb, 1) for mb in held]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=4)
    asked = parser.parse_args()
    found = run(asked.requests, asked.threads)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
