"""The shipped tiny LM with kNN-LM over the standard library's train split, at three store sizes.

    python knnlm.py [ENTRIES ...]

Lambda and temperature are tuned on validation documents for each size, perplexity is measured on
test documents. The LM was trained on the same train split: the store holds what it has seen.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from typing import Any

import torch
from common import save
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.evaluation.knnlm import tune
from memwrap.evaluation.run import documents
from memwrap.stores import FaissStore
from memwrap.training.data import load_documents
from memwrap.training.datastore import build_store

SIZES = (10_000, 40_000, 120_000)
TOKENS, VALIDATION, TEST = 2048, 3, 6


def main() -> None:
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    model: Any = memwrap.wrap(base, memwrap.KnnLMConfig(segment_size=512, top_k=64)).eval()
    memory = model.memories["knnlm"]
    train = load_documents("stdlib", "train")
    validation = documents("stdlib", "validation", tokenizer, TOKENS, VALIDATION)
    test = documents("stdlib", "test", tokenizer, TOKENS, TEST)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = FaissStore(memory.width, path=f"{folder}/store")
        for size in map(int, sys.argv[1:] or SIZES):
            start = time.perf_counter()
            count = build_store(model, tokenizer, train, store, tokens=size, progress=False)
            built = time.perf_counter() - start
            memory.attach(store)
            found = tune(model, validation, progress=False)
            grid = {"weights": (0.0, found.best.interpolation)}
            heat = (found.best.temperature,)
            start = time.perf_counter()
            got = tune(model, test, **grid, temperatures=heat, progress=False)
            spent = time.perf_counter() - start
            mixed = got.settings[-1].nats
            rows.append({
                "entries": count, "documents": len(store.documents), "index": store.made_by,
                "bytes_on_disk": store.disk_bytes, "seconds_to_add": built, "tuned": found.tuned(),
                "validation": {"base": math.exp(found.base), "knnlm": math.exp(found.best.nats)},
                "test": {"base": math.exp(got.base), "knnlm": math.exp(mixed)},
                "test_nats_gained": got.base - mixed, "target_among_neighbours": got.hits,
                "ms_per_token": spent / got.tokens * 1e3,
            })  # fmt: skip
            print(rows[-1], flush=True)
            save("knnlm", {
                "about": "tiny-lm + kNN-LM over the stdlib train split, perplexity",
                "top_k": 64, "key": "ffn", "test_documents": TEST, "tokens_each": TOKENS,
                "validation_documents": VALIDATION, "sizes": rows,
            })  # fmt: skip
        store.close()


if __name__ == "__main__":
    main()
