"""Everything that writes files of its own: two versions of each, and what loading one gives."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from whole import a_store, ids, llama, model_of, of_library, of_model, of_state, of_store, trained

import memwrap
from memwrap import exporting
from memwrap.retrieval.library import Library
from memwrap.serving import NamedStates
from memwrap.stores import FaissStore, open_store

NOTHING = "nothing"


@dataclass(frozen=True)
class Writer:
    """A way to write one of two versions over the other.

    Attributes:
        name: what is written.
        write: called with a folder and the version.
        load: gives what tells versions apart.
        versions: what the two are, where they are not an older and a newer one.
        again: writing the newer version over itself gives it once more.
    """

    name: str
    write: Callable[[Path, int], Any]
    load: Callable[[Path], str]
    versions: str = ""
    again: bool = True


def library(seed: int) -> Library:
    texts = {f"doc{n}": ids(30 + n, seed + n)[0] for n in range(3)}
    return Library.encode(model_of("extended_mind"), texts)


def of_models() -> list[Writer]:
    """A model with its base (in one file and in several, of other numbers), with a store, and an
    export."""
    models = [trained(seed, "armt", num_memory_tokens=2, d_mem=8) for seed in (0, 1)]
    searching = [trained(seed, "knnlm") for seed in (0, 1)]
    for seed, model in enumerate(searching):
        store = FaissStore(32)
        store.add(torch.randn(50 + seed, 32), values=torch.arange(50 + seed))
        store.build()
        model.memories["knnlm"].attach(store)

    def sharded(folder: Path, n: int) -> None:
        models[n].save_pretrained(
            folder / "m", include_base=True, max_shard_size=f"{20 + 30 * n}KB"
        )

    def exported(folder: Path, n: int) -> None:
        shutil.rmtree(folder / "e", ignore_errors=True)
        if n:
            exporting.export(models[1], folder / "e", check=False)

    def exported_there(folder: Path) -> str:
        there = (folder / "e").is_dir() and any((folder / "e").iterdir())
        return of_model(memwrap.load(folder / "e")) if there else NOTHING

    return [
        Writer(
            "model with its base",
            lambda folder, n: models[n].save_pretrained(folder / "m", include_base=True),
            lambda folder: of_model(memwrap.load(folder / "m")),
        ),
        Writer("model in shards", sharded, lambda folder: of_model(memwrap.load(folder / "m"))),
        Writer(
            "model with a store", lambda folder, n: searching[n].save_pretrained(folder / "m"),
            lambda folder: of_model(memwrap.load(folder / "m", llama())),
        ),
        Writer("export", exported, exported_there, "nothing, whole"),
    ]  # fmt: skip


def of_states() -> list[Writer]:
    """Files of states (one memory keeps tensors, another grows), the server's, and a library."""
    found = []
    for memory in ("memorizing", "compact"):
        model = model_of(memory)
        with torch.no_grad():
            states = [model.read(ids(29 + 8 * seed, seed)) for seed in (0, 1)]

        def load(folder: Path, model: Any = model) -> str:
            return of_state(memwrap.MemoryState.load(folder / "s.safetensors", model), model)

        def write(folder: Path, n: int, states: Any = states) -> None:
            states[n].save(folder / "s.safetensors")

        found.append(Writer(f"state of {memory}", write, load))

    def save(folder: Path, n: int) -> None:
        held = NamedStates(model, folder, most_bytes=2**30)
        held.put("a", states[n])
        held.save("a")

    def evict(folder: Path, n: int) -> None:
        """The older one goes to its file where both are too large."""
        held = NamedStates(model, folder, most_bytes=1)
        held.put("a", states[n])
        held.put("b", states[0])

    def named(folder: Path) -> str:
        held = NamedStates(model, folder, most_bytes=2**30)
        assert held.names() == ["a"]
        return of_state(held.get("a")[0], model)

    libraries = [library(0), library(50)]
    return [
        *found,
        Writer("a server's state", save, named),
        Writer("a server's state that makes room", evict, named),
        Writer(
            "library", lambda folder, n: libraries[n].save(folder / "l"),
            lambda folder: of_library(Library.load(folder / "l", model_of("extended_mind"))),
        ),
    ]  # fmt: skip


def of_stores(scratch: Path) -> list[Writer]:
    """A store that is copied, and one that grows, shrinks, is indexed anew and cleared in place."""
    exact = [a_store(seed, factory="torch") for seed in (0, 1)]

    def begin(folder: Path, rows: int) -> FaissStore:
        store = FaissStore(4, path=folder, shard_size=20, factory="Flat")
        vectors = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))[:rows]
        for n, part in enumerate(vectors.split(20)):
            store.add(part, values=torch.arange(len(part)), document=f"d{n}")
        store.remove([3, rows - 1])
        store.build()
        store.close()
        return store

    kept = Path(tempfile.mkdtemp(dir=scratch))
    older, other = begin(kept / "older", 60), begin(kept / "other", 50)

    def change(edit: Callable[[FaissStore], Any]) -> Callable[[Path, int], None]:
        def write(folder: Path, n: int) -> None:
            if not n:
                shutil.rmtree(folder / "s", ignore_errors=True)
                shutil.copytree(kept / "older", folder / "s")
                return
            store = FaissStore(4, path=folder / "s", shard_size=20)
            edit(store)
            store.close()

        return write

    def reindex(store: FaissStore) -> None:
        store.factory = "IVF4,Flat"
        store.build()

    def copied(folder: Path, n: int) -> None:
        (other if n else older).save(folder / "to")

    def there(folder: Path) -> str:
        return of_store(open_store(folder / "s"))

    def of_copy(folder: Path) -> str:
        return of_store(open_store(folder / "to"))

    def counted(folder: Path) -> str:
        """What is kept; the index makes no difference to what is found here, so that is told
        too."""
        store: Any = open_store(folder / "s")
        return of_store(store) + store.made_by

    more = torch.randn(20, 4, generator=torch.Generator().manual_seed(9))
    names = "without, with"
    return [
        Writer(
            "exact store", lambda folder, n: exact[n].save(folder / "s"), there,
        ),
        Writer("store that is copied", copied, of_copy),
        Writer(
            "entries of a store", change(lambda s: s.add(more, values=[7] * 20)), there, names,
            again=False,
        ),
        Writer("removals of a store", change(lambda s: s.remove([8, 41])), there, names),
        Writer("index of a store", change(reindex), counted),
        Writer("store that is cleared", change(FaissStore.clear), there, "before, after"),
    ]  # fmt: skip


def writers(scratch: Path) -> list[Writer]:
    """Make them; `scratch` is for files that they need."""
    return [*of_models(), *of_states(), *of_stores(scratch)]
