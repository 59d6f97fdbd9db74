"""One whole file or folder of every kind that memwrap reads, and what loading one gives."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import small
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small import VOCABULARY
from torch import Tensor

import memwrap
from memwrap import exporting
from memwrap.retrieval.library import Library
from memwrap.serving import NamedStates
from memwrap.state.trees import tree_leaves
from memwrap.stores import FaissStore, Store, TorchStore, open_store
from memwrap.testing.helpers import randomise, tiny
from memwrap.training.recipe import load_recipe

STATES = tuple(memwrap.available())
STORES = {"flat": "Flat", "lists": "IVF4,Flat", "graph": "HNSW8"}
RECIPE = """
task: finetune
output: runs/${memory.name}
model: {name: tiny-lm}
memory: {name: rmt, segment_size: 64, num_memory_tokens: 2}
lora: {r: 4}
data: {source: stdlib}
trainer: {steps: 3}
"""


def llama() -> Any:
    return small.llama().eval()


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@cache
def model_of(memory: str) -> Any:
    """The model whose states and libraries are read."""
    return randomise(memwrap.wrap(llama(), tiny(memory))).eval()


def trained(seed: int, memory: str = "rmt", **settings: Any) -> Any:
    """A model that is saved."""
    return randomise(memwrap.wrap(llama(), memory, segment_size=8, **settings), seed).eval()


def a_store(seed: int, path: Path | None = None, factory: str | None = None, dim: int = 4) -> Any:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(300, dim, generator=generator)
    options: Any = {"path": path, "factory": factory, "shard_size": 100}
    store = TorchStore(dim) if factory == "torch" else FaissStore(dim, **options)
    for number, part in enumerate(vectors.split(100)):
        spans = torch.stack([torch.arange(100), torch.arange(100) + 1], 1)
        store.add(part, values=torch.arange(100) % 60, document=f"d{number}", spans=spans)
    return store


def build(root: Path, seed: int) -> None:
    """Write one of everything; another seed gives others of the same kinds."""
    with torch.no_grad():
        for memory in STATES:
            state = model_of(memory).read(ids(29 + seed, seed))
            state.save(root / f"state-{memory}" / "state.safetensors")
    model = trained(seed, num_memory_tokens=2)
    model.add_lora(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise_adapters(model, seed)
    model.save_pretrained(root / "model")
    whole = trained(seed, "armt", num_memory_tokens=2, d_mem=8)
    whole.save_pretrained(root / "model-with-base", include_base=True)
    shutil.copytree(root / "model-with-base", root / "model-in-shards")
    in_shards(root / "model-in-shards")
    exporting.export(trained(seed, num_memory_tokens=2), root / "export", check=False)
    searching = trained(seed, "knnlm")
    searching.memories["knnlm"].attach(a_store(seed, factory="Flat", dim=32))
    searching.save_pretrained(root / "model-with-store")
    for name, factory in STORES.items():
        store = a_store(seed, root / f"store-{name}", factory)
        store.remove([3 + seed])
        store.build()
        store.close()
    a_store(seed, factory="torch").save(root / "store-torch")
    served = NamedStates(model_of("compressive"), root / "server", most_bytes=2**30)
    for number, name in enumerate(("first", "second")):
        served.put(name, served.model.read(ids(25 + 9 * number + seed, seed + 7 * number)))
        served.save(name)
    texts = {f"doc{n}": ids(30 + n, seed + n)[0] for n in range(3)}
    Library.encode(model_of("extended_mind"), texts).save(root / "library")
    (root / "recipe").mkdir()
    (root / "recipe" / "run.yaml").write_text(RECIPE.replace("r: 4", f"r: {4 + seed}"))


def randomise_adapters(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def in_shards(folder: Path) -> None:
    """As other programs write a model: two files and an index, without memwrap's seal."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(places.values()):
        part = {n: tensors[n] for n in names if places[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config.pop("sealed")
    (folder / "config.json").write_text(json.dumps(config))


# Loading, and what it gives


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{tuple(part.shape)} {part.dtype}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            part = flat.view(torch.uint8).numpy().tobytes()
        found.update(part if isinstance(part, bytes) else repr(part).encode())
    return found.hexdigest()


def of_state(state: Any, model: Any) -> str:
    with torch.no_grad():
        out = model(ids(11, 99), cache=state.clone())
    leaves = [x for tree in state.memories.values() for pair in tree_leaves(tree) for x in pair]
    return digest(*leaves, state.fill, state.segments, state.tokens_seen, state.columns,
                  state.hold_open, out.logits)  # fmt: skip


def of_model(model: Any) -> str:
    with torch.no_grad():
        logits = model(ids(20, 99)).logits
    tensors = model.state_dict()
    settings = [config.to_dict() for config in model.memory_configs]
    generation = model.generation_config.to_diff_dict()
    generation.pop("transformers_version", None)
    return digest(*[x for n in sorted(tensors) for x in (n, tensors[n])], settings, logits,
                  sorted(map(str, generation.items())))  # fmt: skip


def of_store(store: Store) -> str:
    if isinstance(store, FaissStore):
        store.verify()
    queries = torch.randn(4, store.dim, generator=torch.Generator().manual_seed(5))
    found = store.search(queries, 5)
    beside = store.entries(found.ids)
    columns = [getattr(beside, name).tobytes() for name in beside.FIELDS]
    return digest(found.scores, found.ids, *columns, tuple(store.documents), store.notes,
                  store.cursor, len(store), store.identity)  # fmt: skip


def of_library(library: Library) -> str:
    state = of_state(library.state, library.model)
    return digest(*[x for pair in library.documents.items() for x in pair], library.entries, state)


def of_server(folder: Path) -> str:
    """What a server that is started over a folder of states serves."""
    served = NamedStates(model_of("compressive"), folder, most_bytes=2**30)
    states = [of_state(served.get(name)[0], served.model) for name in ("first", "second")]
    return digest(served.names(), *states)


def load_state(memory: str) -> Callable[[Path], str]:
    def load(folder: Path) -> str:
        model = model_of(memory)
        return of_state(memwrap.MemoryState.load(folder / "state.safetensors", model), model)

    return load


LOADERS: dict[str, Callable[[Path], str]] = {
    **{f"state-{memory}": load_state(memory) for memory in STATES},
    "model": lambda folder: of_model(memwrap.load(folder, llama())),
    "model-with-base": lambda folder: of_model(memwrap.load(folder)),
    "model-in-shards": lambda folder: of_model(memwrap.load(folder)),
    "model-with-store": lambda folder: of_model(memwrap.load(folder, llama())),
    "export": lambda folder: of_model(memwrap.load(folder)),
    **{f"store-{name}": lambda folder: of_store(open_store(folder)) for name in STORES},
    "store-torch": lambda folder: of_store(open_store(folder)),
    "server": of_server,
    "library": lambda folder: of_library(Library.load(folder, model_of("extended_mind"))),
    "recipe": lambda folder: load_recipe(folder / "run.yaml").to_yaml(),
}
