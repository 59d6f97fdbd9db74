"""The shipped tiny LM with retrieval memories, on the same held-out files of the standard library.

    python retrieval.py [base] [knnlm] [extended_mind] [neurocache]

All read the same test documents in segments of the same length. kNN-LM and Extended Mind are given
the same documents of the train split, at three sizes, and are tuned on validation documents; the LM
was trained on that split, so that they hold what it has seen. Neurocache is trained with LoRA by
its recipe. Each part is put into `results/retrieval.json` beside those that are there;
`retrieval_table.py` makes the table.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.data.documents import load_documents
from memwrap.evaluation.controls import windowed
from memwrap.evaluation.knnlm import tune
from memwrap.evaluation.perplexity import token_nll
from memwrap.evaluation.run import documents
from memwrap.retrieval.datastore import build_store
from memwrap.retrieval.library import Library, count_of
from memwrap.stores import FaissStore
from memwrap.training.finetune import run_recipe
from memwrap.training.recipe import load_recipe

SIZES = (10_000, 40_000, 120_000)
SEGMENT, TOKENS, VALIDATION, TEST = 512, 2048, 3, 6
NEIGHBOURS = 64
THRESHOLDS, LAYERS = (None, 0.8), (None, [3, 4, 5])
RECIPE, STEPS, SEED = "neurocache_lora_tiny", 100, 0
OVERRIDES = [
    f"memory.segment_size={SEGMENT}", f"trainer.steps={STEPS}", f"trainer.seed={SEED}",
    "trainer.memory_learning_rate=2e-3", "trainer.precision=fp32", "trainer.eval_every=null",
    "trainer.save_every=null",
]  # fmt: skip


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(asset("tiny-lm"))


def wrapped(name: str, **settings: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    return memwrap.wrap(base, name, segment_size=SEGMENT, **settings).eval()


def held_out(split: str) -> Tensor:
    """Ids `(documents, TOKENS)`."""
    count = VALIDATION if split == "validation" else TEST
    return torch.stack(documents("stdlib", split, tokenizer(), TOKENS, count))


@torch.no_grad()
def nats(model: Any, ids: Tensor, control: str | None = None, state: Any = None) -> list[float]:
    """Nats per token of each row, read together; with `state` one after the other, each from it."""
    if state is not None:
        return [n for row in ids for n in nats_from(model, row[None], control, state.clone())]
    first = None if control == "off" else model.new_state(len(ids))
    return nats_from(model, ids, control, first)


def nats_from(model: Any, ids: Tensor, control: str | None, state: Any) -> list[float]:
    found = []
    for start in range(0, ids.shape[1], SEGMENT):
        out = model(
            input_ids=ids[:, start : start + SEGMENT], cache=state,
            use_cache=state is not None, memory_control=control,
        )  # fmt: skip
        found.append(token_nll(out.logits, ids, torch.ones_like(ids), start))
    return torch.cat(found, 1).nanmean(1).tolist()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def base() -> dict[str, Any]:
    """The LM alone: segment by segment, and with a sliding window and sinks."""
    ids = held_out("test")
    model = wrapped("extended_mind")
    found = [token_nll(model.backbone(p).logits, ids, torch.ones_like(ids), SEGMENT * i)
             for i, p in enumerate(ids.split(SEGMENT, 1))]  # fmt: skip
    segments = torch.cat(found, 1).nanmean(1).tolist()
    with windowed(model, SEGMENT, len(ids)) as (feed, piece):
        found = [token_nll(feed(p, torch.ones_like(p)), ids, torch.ones_like(ids), piece * i)
                 for i, p in enumerate(ids.split(piece, 1))]  # fmt: skip
    return {"segments": segments, "window_and_sinks": torch.cat(found, 1).nanmean(1).tolist()}


def knnlm() -> dict[str, Any]:
    """kNN-LM at each size, lambda and temperature tuned on validation documents."""
    model = wrapped("knnlm", top_k=NEIGHBOURS)
    memory, test = model.memories["knnlm"], held_out("test")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = FaissStore(memory.width, path=f"{folder}/store")
        for size in SIZES:
            start = time.perf_counter()
            train = load_documents("stdlib", "train")
            count = build_store(model, tokenizer(), train, store, tokens=size, progress=False)
            built = time.perf_counter() - start
            memory.attach(store)
            found = tune(model, list(held_out("validation")), progress=False)
            grid: dict[str, Any] = {
                "weights": (0.0, found.best.interpolation),
                "temperatures": (found.best.temperature,),
            }
            start = time.perf_counter()
            got = [tune(model, [row], **grid, progress=False) for row in test]
            spent = time.perf_counter() - start
            rows.append({
                "entries": count, "documents": len(store.documents), "index": store.made_by,
                "bytes": store.disk_bytes, "seconds_to_add": built, "tuned": found.tuned(),
                "validation_gain": found.base - found.best.nats,
                "nats": [one.settings[-1].nats for one in got],
                "target_among_neighbours": mean([one.hits for one in got]),
                "ms_per_token": spent / test.numel() * 1e3,
            })  # fmt: skip
            print(rows[-1], flush=True)
        store.close()
    return {"top_k": NEIGHBOURS, "key": memory.config.key, "sizes": rows}


def shelves() -> Iterator[dict[str, Tensor]]:
    """The documents of the train split that kNN-LM's store holds at each size."""
    words, shelf, count = tokenizer(), {}, 0
    train = iter(load_documents("stdlib", "train"))
    for size in SIZES:
        while count < size:
            document = next(train)
            ids = torch.tensor(words(document.text, verbose=False)["input_ids"])
            shelf[document.name], count = ids, count + len(ids) - 1
        yield dict(shelf)


def extended_mind() -> dict[str, Any]:
    """Extended Mind with a library of each size; threshold and layers tuned with the first."""
    test, validation = held_out("test"), held_out("validation")
    tried: list[dict[str, Any]] = []
    first = next(shelves())
    for layers, threshold in itertools.product(LAYERS, THRESHOLDS):
        settings = {"layers": layers, "similarity_threshold": threshold}
        model = wrapped("extended_mind", **settings)
        library = Library.encode(model, first, special_ids=())
        tried.append({**settings, "nats": mean(nats(model, validation, state=library.state))})
        print(tried[-1], flush=True)
    off = mean(nats(wrapped("extended_mind"), validation, "off"))
    best = min(tried, key=lambda one: one["nats"])
    chosen = {k: best[k] for k in ("layers", "similarity_threshold")}
    rows = []
    plain = {"layers": None, "similarity_threshold": None}
    for settings in (plain, chosen):
        model = wrapped("extended_mind", cache_size=200_000, **settings)
        own = {"settings": settings, "document_alone": nats(model, test), "sizes": []}
        rows.append(own)
        for number, shelf in enumerate(shelves()):
            if number and settings != chosen:
                break  # the defaults with the smallest library only: they take long
            start = time.perf_counter()
            library = Library.encode(model, shelf, special_ids=())
            built = time.perf_counter() - start
            start = time.perf_counter()
            found = nats(model, test, state=library.state)
            own["sizes"].append({
                "entries": count_of(library.state), "documents": len(shelf),
                "bytes": library.state.nbytes, "seconds_to_add": built, "nats": found,
                "ms_per_token": (time.perf_counter() - start) / test.numel() * 1e3,
            })  # fmt: skip
            print(own["sizes"][-1], flush=True)
        if settings == chosen:
            break
    return {"top_k": model.memories["extended_mind"].config.top_k, "tuning": tried,
            "validation_off": off, "settings": rows}  # fmt: skip


def neurocache() -> dict[str, Any]:
    """Neurocache after a short training by its recipe."""
    test = held_out("test")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        start = time.perf_counter()
        run_recipe(load_recipe(RECIPE, [*OVERRIDES, f"output={path}"]))
        spent = time.perf_counter() - start
        model = memwrap.load(path).eval()
    controls = {"memory": None, "off": "off", "shuffled": "shuffled"}
    found = {name: nats(model, test, control) for name, control in controls.items()}
    state = model.close_segment(model.read(test[:1]))
    return {
        "recipe": RECIPE, "overrides": OVERRIDES, "seconds_to_train": spent, "bytes": state.nbytes,
        "entries": TOKENS, **found,
    }  # fmt: skip


PARTS = {"base": base, "knnlm": knnlm, "extended_mind": extended_mind, "neurocache": neurocache}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PARTS:
        start = time.perf_counter()
        torch.manual_seed(SEED)
        result = PARTS[name]()
        result["machine"] = {"measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **machine()}
        result["seconds"] = time.perf_counter() - start
        path = RESULTS / "retrieval.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        save("retrieval", {
            "about": "tiny-lm with retrieval memories, nats per token of each held-out document",
            "command": "python benchmarks/retrieval.py", "seed": SEED, "segment_size": SEGMENT,
            "test_documents": TEST, "tokens_each": TOKENS, "validation_documents": VALIDATION,
            **{k: v for k, v in before.items() if k in PARTS}, name: result,
        })  # fmt: skip


if __name__ == "__main__":
    main()
